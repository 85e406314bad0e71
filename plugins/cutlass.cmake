# The experts' products by CUTLASS, moe/cutlass, for compute capability 9.0 alone. A tile takes the compiler most of a
# minute and 3 to 4 GB: each has its file, and one is compiled at a time (by Ninja, which has pools).
#
# CUTLASS's headers are those in CUTLASS_INCLUDE_DIR, else those of PyPI's nvidia-cutlass in the Python that runs the
# build. Without them, and for other GPUs, grouped_missing.cpp says that there are no such products.

execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE site_packages
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_path(CUTLASS_INCLUDE_DIR cutlass/version.h HINTS "${site_packages}/cutlass_library/source" PATH_SUFFIXES include
    DOC "Folder of CUTLASS's headers; OFF: the library is built without them")
if(CUTLASS_INCLUDE_DIR AND NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h")
    message(FATAL_ERROR "CUTLASS_INCLUDE_DIR is ${CUTLASS_INCLUDE_DIR}, where there is no cutlass/version.h")
endif()

# why_no_cutlass(RESULT): empty where the products can be built.
function(why_no_cutlass result)
    set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
    if(architectures MATCHES "^(all|all-major|native)$")
        string(MAKE_C_IDENTIFIER "${architectures}" name)
        string(TOUPPER "${name}" name)
        set(architectures "${CMAKE_CUDA_ARCHITECTURES_${name}}")
    endif()
    set(why "")
    if(NOT architectures MATCHES "(^|;)90a?(-real|-virtual)?(;|$)")
        set(why "the library is not for compute capability 9.0")
    elseif(NOT CMAKE_CUDA_COMPILER_ID STREQUAL NVIDIA OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
        set(why "${CMAKE_CUDA_COMPILER} is not nvcc of CUDA 12 or later, which knows sm_90a")
    elseif(NOT CUTLASS_INCLUDE_DIR)
        set(why "CUTLASS_INCLUDE_DIR is ${CUTLASS_INCLUDE_DIR}")
    else()
        file(STRINGS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h" major REGEX "define CUTLASS_MAJOR ")
        string(REGEX MATCH "[0-9]+" major "${major}")
        if(major LESS 4)
            set(why "${CUTLASS_INCLUDE_DIR} is of CUTLASS ${major}, older than 4")
        endif()
    endif()
    set(${result} "${why}" PARENT_SCOPE)
endfunction()

why_no_cutlass(why)
if(why)
    message(STATUS "CUTLASS: no, ${why}")
    target_sources(qwenforge_plugins PRIVATE moe/cutlass/grouped_missing.cpp)
    target_sources(qwenforge_ort PRIVATE moe/cutlass/grouped_missing.cpp)
    return()
endif()
message(STATUS "CUTLASS: ${CUTLASS_INCLUDE_DIR}")

add_library(qwenforge_grouped_gemm OBJECT
    moe/cutlass/grouped_gemm.cu
    moe/cutlass/sm90_bfloat16_128x128.cu
    moe/cutlass/sm90_bfloat16_64x128.cu
    moe/cutlass/sm90_half_128x128.cu
    moe/cutlass/sm90_half_64x128.cu)
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cutlass=1)
set_target_properties(qwenforge_grouped_gemm PROPERTIES
    CUDA_ARCHITECTURES 90a-real
    CUDA_COMPILER_LAUNCHER "${launcher}"
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
    JOB_POOL_COMPILE cutlass)
target_include_directories(qwenforge_grouped_gemm PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_include_directories(qwenforge_grouped_gemm SYSTEM PRIVATE
    "${CUTLASS_INCLUDE_DIR}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(qwenforge_grouped_gemm PRIVATE
    --Werror=all-warnings -Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr -Xptxas=-v)
target_sources(qwenforge_plugins PRIVATE $<TARGET_OBJECTS:qwenforge_grouped_gemm>)
target_sources(qwenforge_ort PRIVATE $<TARGET_OBJECTS:qwenforge_grouped_gemm>)
