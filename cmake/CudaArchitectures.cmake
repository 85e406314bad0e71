# default_cuda_architectures(RESULT NVCC): the GPUs of qwenforge that this compiler knows. 80 A100, 86 and 89 GeForce and
# L4, 87 Orin, 90 Hopper, 100 B200, 110 Thor, 120 GeForce and RTX PRO; the newest as PTX too, for what comes after.

function(default_cuda_architectures result nvcc)
    execute_process(COMMAND "${nvcc}" --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
    foreach(architecture 80 86 87 89 90 100 110 120)
        if(known MATCHES "sm_${architecture}[^0-9a-z]")
            list(APPEND found ${architecture})
        endif()
    endforeach()
    if(NOT found)
        message(FATAL_ERROR "${nvcc} knows none of the GPUs that qwenforge has kernels for: use CUDA 12 or 13")
    endif()
    list(POP_BACK found newest)
    list(TRANSFORM found APPEND "-real")
    set(${result} ${found} ${newest} PARENT_SCOPE)
endfunction()
