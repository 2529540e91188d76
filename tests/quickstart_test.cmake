# SPDX-License-Identifier: Apache-2.0
# The program runs, and the README has its code, from the include on, and its output.
execute_process(COMMAND ${program} OUTPUT_VARIABLE output RESULT_VARIABLE result)
string(STRIP "${output}" output)
file(READ ${source} code)
string(FIND "${code}" "#include" begin)
string(SUBSTRING "${code}" ${begin} -1 code)
file(READ ${readme} text)
string(FIND "${text}" "${code}" code_found)
string(FIND "${text}" "`${output}`" output_found)
if(NOT result EQUAL 0 OR output STREQUAL "" OR code_found EQUAL -1 OR output_found EQUAL -1)
  message(FATAL_ERROR "exit code ${result}, '${output}'; found in the README (-1: not): "
                      "code ${code_found}, output ${output_found}")
endif()
