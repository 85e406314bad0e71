# libqwenforge_ort.so: the same kernels as custom ops of ONNX Runtime, which hands the table of its functions in.

# ONNX Runtime's own header where it is, else onnxruntime/ort_abi.h.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h HINTS "${ONNXRUNTIME_ROOT}" ENV ONNXRUNTIME_ROOT
    PATH_SUFFIXES include include/onnxruntime onnxruntime
    DOC "Folder of onnxruntime_c_api.h; without it the library is compiled against our declaration of its interface")
if(ONNXRUNTIME_INCLUDE_DIR AND NOT EXISTS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h")
    message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is ${ONNXRUNTIME_INCLUDE_DIR}, where there is no onnxruntime_c_api.h")
endif()

add_library(qwenforge_ort SHARED
    ${specs}
    attention/attention_op.cpp
    common/contract.cpp
    common/fields.cpp
    moe/moe_op.cpp
    onnxruntime/op_schema.cpp
    onnxruntime/kernel.cpp
    onnxruntime/ort_values.cpp
    onnxruntime/register.cpp
    onnxruntime/shape_inference.cpp)
set_target_properties(qwenforge_ort PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    LINKER_LANGUAGE CUDA
    VISIBILITY_INLINES_HIDDEN ON
    LINK_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/onnxruntime/exports.map")
target_include_directories(qwenforge_ort PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}" "${generated}")
target_include_directories(qwenforge_ort SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
if(ONNXRUNTIME_INCLUDE_DIR)
    message(STATUS "ONNX Runtime's header: ${ONNXRUNTIME_INCLUDE_DIR}")
    target_include_directories(qwenforge_ort SYSTEM PRIVATE "${ONNXRUNTIME_INCLUDE_DIR}")
    target_compile_definitions(qwenforge_ort PRIVATE QWENFORGE_OFFICIAL_ONNXRUNTIME_HEADERS)
else()
    message(STATUS "ONNX Runtime's header: none, onnxruntime/ort_abi.h declares what is needed")
endif()
target_compile_definitions(qwenforge_ort PRIVATE QWENFORGE_VERSION="${PROJECT_VERSION}")
target_compile_options(qwenforge_ort PRIVATE
    -Wall -Wextra -Wshadow -Wconversion -Werror -fno-exceptions -fno-rtti)
target_sources(qwenforge_ort PRIVATE $<TARGET_OBJECTS:qwenforge_kernels>)
target_link_options(qwenforge_ort PRIVATE
    "LINKER:--no-undefined,--exclude-libs=ALL,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/onnxruntime/exports.map")
