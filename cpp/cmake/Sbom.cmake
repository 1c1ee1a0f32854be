# The wheel's list of parts: what of others is compiled into it, in CycloneDX, where PEP 770 wants it. NOTICE says where
# each part is; the versions are known here alone. Nothing in it changes from one build to the next.
file(STRINGS "${PISSA_EIGEN_DIR}/Eigen/src/Core/util/Macros.h" lines REGEX "define EIGEN_(WORLD|MAJOR|MINOR)_VERSION +[0-9]+$")
if(EXISTS "${PISSA_EIGEN_DIR}/Eigen/Version")  # from 5.0 on
  file(STRINGS "${PISSA_EIGEN_DIR}/Eigen/Version" lines REGEX "define EIGEN_(MAJOR|MINOR|PATCH)_VERSION +[0-9]+$")
endif()
list(TRANSFORM lines REPLACE ".* " "")
list(JOIN lines "." eigen_version)
file(STRINGS "${PISSA_TORCH_DIR}/version.py" torch_version REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+[0-9a-z.]*" torch_version "${torch_version}")  # without the build behind a "+"

set(components "")
set(references "")
function(pissa_part name version package license)
  set(reference "pkg:${package}@${version}")
  string(CONCAT component "{\"type\": \"library\", \"name\": \"${name}\", \"version\": \"${version}\", "
                          "\"bom-ref\": \"${reference}\", \"purl\": \"${reference}\", \"licenses\": [{\"license\": ${license}}]}")
  set(components ${components} "${component}" PARENT_SCOPE)
  set(references ${references} "\"${reference}\"" PARENT_SCOPE)
endfunction()
pissa_part(Eigen ${eigen_version} generic/eigen "{\"id\": \"MPL-2.0\"}")
pissa_part(pybind11 ${pybind11_VERSION} pypi/pybind11 "{\"id\": \"BSD-3-Clause\"}")
pissa_part(PyTorch ${torch_version} pypi/torch "{\"id\": \"BSD-3-Clause\"}")
if(PISSA_CUDA_FOUND)
  pissa_part("CUDA runtime" ${PISSA_CUDA_RUNTIME} pypi/nvidia-cuda-runtime "{\"name\": \"CUDA Toolkit EULA\"}")
endif()
list(JOIN components ",\n    " components)
list(JOIN references ", " references)

file(CONFIGURE OUTPUT pissa.cdx.json @ONLY CONTENT [[{
  "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
  "bomFormat": "CycloneDX",
  "specVersion": "1.6",
  "version": 1,
  "metadata": {
    "component": {"type": "library", "name": "pissa", "version": "@PISSA_VERSION@", "bom-ref": "pkg:pypi/pissa@@PISSA_VERSION@",
                  "purl": "pkg:pypi/pissa@@PISSA_VERSION@", "licenses": [{"license": {"id": "Apache-2.0"}}]}
  },
  "components": [
    @components@
  ],
  "dependencies": [{"ref": "pkg:pypi/pissa@@PISSA_VERSION@", "dependsOn": [@references@]}]
}
]])
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/pissa.cdx.json" DESTINATION "${SKBUILD_METADATA_DIR}/sboms" COMPONENT python)
