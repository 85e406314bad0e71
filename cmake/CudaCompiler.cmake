# Chooses the CUDA compiler before project(): the one you name with CMAKE_CUDA_COMPILER or CUDACXX, else the one of PyPI's
# wheels (nvidia-cuda-nvcc and its companions, see tests/requirements.txt) in the Python that runs the build, else the
# toolkit on PATH, in CUDA_PATH or in /usr/local/cuda.

find_package(Python3 3.10 REQUIRED COMPONENTS Interpreter)

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    execute_process(
        COMMAND ${Python3_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
        OUTPUT_VARIABLE site_packages
        OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    file(GLOB compilers "${site_packages}/nvidia/cu*/bin/nvcc")
    if(compilers)
        list(SORT compilers COMPARE NATURAL ORDER DESCENDING)
        list(GET compilers 0 compiler)
        set(CMAKE_CUDA_COMPILER "${compiler}" CACHE FILEPATH "The CUDA compiler")
    else()
        find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
            DOC "The CUDA compiler")
        if(NOT CMAKE_CUDA_COMPILER)
            message(FATAL_ERROR "There is no CUDA compiler: `make plugins` brings one, or name yours with CMAKE_CUDA_COMPILER")
        endif()
    endif()
endif()

# The wheels keep their libraries in lib, where nvcc does not look by itself.
if(CMAKE_CUDA_COMPILER MATCHES "/nvidia/cu[0-9]+/bin/nvcc$")
    cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH wheel)
    cmake_path(GET wheel PARENT_PATH wheel)
    set(CMAKE_CUDA_FLAGS_INIT "-L${wheel}/lib")
endif()
