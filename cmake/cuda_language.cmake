# How CUDA sources are compiled, in the project and in cuda_probe.

enable_language(CUDA)

# nvcc compiles C++20 since 12.0. CMake before 3.26 does not know the compiler option for it.
foreach(kind IN ITEMS STANDARD EXTENSION)
  if(NOT DEFINED CMAKE_CUDA20_${kind}_COMPILE_OPTION)
    set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
  endif()
endforeach()

function(rnnfast_cuda_kernels target)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  # Kernels call constexpr functions of the host.
  target_compile_options(${target} PRIVATE --expt-relaxed-constexpr -Xptxas -warn-spills)
endfunction()

function(rnnfast_cuda_module target)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CUDA CUDA_RUNTIME_LIBRARY Static)
endfunction()
