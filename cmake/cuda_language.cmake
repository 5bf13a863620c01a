# How CUDA sources are compiled, in the project and in cuda_probe, which tries it out.

# The PTX of the last one serves later devices.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()

enable_language(CUDA)

# nvcc has compiled C++20 since 12.0. CMake knows it only since 3.26, and needs no more than the option's name.
foreach(kind IN ITEMS STANDARD EXTENSION)
  if(NOT DEFINED CMAKE_CUDA20_${kind}_COMPILE_OPTION)
    set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
  endif()
endforeach()

function(rnnfast_cuda_kernels target)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  # Constants that kernels share with the host are constexpr functions without an attribute.
  target_compile_options(${target} PRIVATE --expt-relaxed-constexpr -Xptxas -warn-spills)
endfunction()

function(rnnfast_cuda_module target)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CUDA CUDA_RUNTIME_LIBRARY Static)
endfunction()
