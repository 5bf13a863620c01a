# Checks whether CUDA kernels can be built on this machine. A missing, broken or too old CUDA compiler is a fatal
# error in the project that enables CUDA. So a project of its own, cuda_probe, tries the compiler first.

set(RNNFAST_OLDEST_NVCC 12.0) # the first version with C++20

# The path of the nvcc that CMake would choose; an empty string if there is none.
function(rnnfast_find_nvcc result)
  set(nvcc "")
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    get_filename_component(nvcc "$ENV{CUDACXX}" PROGRAM)
    if(NOT nvcc)
      set(nvcc "$ENV{CUDACXX}") # this path does not exist; messages name it
    endif()
  else()
    unset(RNNFAST_NVCC CACHE) # an earlier configuration may have cached another result
    find_program(RNNFAST_NVCC nvcc PATHS ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
    if(RNNFAST_NVCC)
      set(nvcc ${RNNFAST_NVCC})
    endif()
    unset(RNNFAST_NVCC CACHE)
  endif()
  set(${result} ${nvcc} PARENT_SCOPE)
endfunction()

# The line of a failed command's output that says why the command failed: the first error of the compiler or
# linker, else the first line that is not empty, else the exit status.
function(rnnfast_first_error result status output)
  string(REGEX REPLACE "[][;]" "|" output "${output}") # CMake lists give these characters a meaning
  string(REGEX REPLACE "[\r\n]+" ";" lines "${output}")
  list(FILTER lines EXCLUDE REGEX "^ *$|^CMake Error")
  set(errors ${lines})
  list(FILTER errors INCLUDE REGEX "(error|fatal) *:|cannot find")
  if(status MATCHES "^[0-9]+$")
    set(status "exit status ${status}")
  endif()
  list(APPEND errors ${lines} "${status}")
  list(GET errors 0 line)
  string(STRIP "${line}" line)
  set(${result} "${line}" PARENT_SCOPE)
endfunction()

# One line that says why the CUDA kernels cannot be built; an empty string if they can.
function(rnnfast_check_cuda result)
  set(${result} "" PARENT_SCOPE)
  rnnfast_find_nvcc(nvcc)
  if(NOT nvcc)
    set(${result} "there is no nvcc on PATH" PARENT_SCOPE)
    return()
  endif()
  list(JOIN nvcc " " name)

  execute_process(COMMAND ${nvcc} --version
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  rnnfast_first_error(line "${status}" "${errors}\n${output}")
  if(NOT status STREQUAL 0)
    set(${result} "`${name} --version` fails: ${line}" PARENT_SCOPE)
    return()
  endif()
  if(NOT output MATCHES "release [0-9.]+, V([0-9.]+)")
    set(${result} "${name} is not nvcc: ${line}" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS RNNFAST_OLDEST_NVCC)
    set(${result} "${name} is nvcc ${version}, older than ${RNNFAST_OLDEST_NVCC}" PARENT_SCOPE)
    return()
  endif()

  # Machine code for each architecture whose devices cannot run that of an earlier one. The one without "-real"
  # includes PTX, which devices of other architectures compile at first use.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100 120-real)
    if(version VERSION_LESS 12.8) # which knows no later ones
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
    set(CMAKE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" PARENT_SCOPE)
  endif()

  set(folder ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe)
  file(REMOVE_RECURSE ${folder})
  set(settings "")
  if("$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER ${nvcc})
  endif()
  foreach(setting IN ITEMS CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE CMAKE_CUDA_COMPILER
      CMAKE_CUDA_HOST_COMPILER CMAKE_CUDA_ARCHITECTURES CMAKE_CUDA_FLAGS)
    if(${setting})
      string(APPEND settings "set(${setting} [==[${${setting}}]==] CACHE STRING \"\")\n")
    endif()
  endforeach()
  file(WRITE ${folder}/settings.cmake "${settings}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -C ${folder}/settings.cmake -G ${CMAKE_GENERATOR}
      -S ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda_probe -B ${folder}
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(status STREQUAL 0)
    execute_process(COMMAND ${CMAKE_COMMAND} --build ${folder}
      RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  endif()
  if(NOT status STREQUAL 0)
    rnnfast_first_error(line "${status}" "${errors}\n${output}")
    set(${result} "nvcc ${version} (${name}) fails with CMake ${CMAKE_VERSION}: ${line}" PARENT_SCOPE)
    return()
  endif()
  if("$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER ${nvcc} CACHE FILEPATH "CUDA compiler" FORCE)
  endif()
endfunction()
