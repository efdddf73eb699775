# SPDX-License-Identifier: Apache-2.0
# CANN_VERSION <- the toolkit's version, major.minor.patch; stops where it is older than the kernels' calls.
# 8.5.0 is the oldest release whose headers have been read for every call.
set(MINIMUM_CANN_VERSION 8.5.0)

if(NOT CANN_VERSION)
  file(GLOB candidates "${ASCEND_HOME_PATH}/*-linux/ascend_toolkit_install.info")
  list(APPEND candidates
       "${ASCEND_HOME_PATH}/share/info/asc-devkit/version.info" "${ASCEND_HOME_PATH}/toolkit/version.info"
       "${ASCEND_HOME_PATH}/compiler/version.info" "${ASCEND_HOME_PATH}/version.info" "${ASCEND_HOME_PATH}/version.cfg")
  foreach(candidate ${candidates})
    if(NOT CANN_VERSION AND EXISTS "${candidate}")
      file(READ "${candidate}" content)
      # "Version=8.5.0", "version=8.3.RC1", "..._running_version=[7.7.0.1.238:8.3.RC1]": the toolkit's is the last one.
      if(content MATCHES "[Vv]ersion=\\[?([0-9.]+:)?([0-9]+)\\.([0-9]+)\\.(RC)?([0-9]+)")
        set(CANN_VERSION "${CMAKE_MATCH_2}.${CMAKE_MATCH_3}.0")
        if(NOT CMAKE_MATCH_4)
          set(CANN_VERSION "${CMAKE_MATCH_2}.${CMAKE_MATCH_3}.${CMAKE_MATCH_5}")
        endif()
      endif()
    endif()
  endforeach()
endif()
if(NOT CANN_VERSION)
  message(FATAL_ERROR "no file under ${ASCEND_HOME_PATH} says which CANN this is: pass -DCANN_VERSION=9.0.0 "
                      "(make kernel KERNEL_FLAGS=-DCANN_VERSION=9.0.0)")
endif()
if(CANN_VERSION VERSION_LESS MINIMUM_CANN_VERSION)
  message(FATAL_ERROR "CANN ${CANN_VERSION} under ${ASCEND_HOME_PATH}: the AscendC kernels need "
                      "${MINIMUM_CANN_VERSION} or newer. Install one (or pass -DCANN_VERSION=... where this one is "
                      "newer than its files say), or train with --ternary-backend triton or torch")
endif()
message(STATUS "CANN ${CANN_VERSION}")
