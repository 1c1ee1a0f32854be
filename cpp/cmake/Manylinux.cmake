# The interface target `pissa_manylinux`, empty without PISSA_MANYLINUX: what manylinux.cc has of newer releases of libstdc++
# and glibc, ahead of their own libraries. An archive: only what is needed is linked, and nobody else sees it.
add_library(pissa_manylinux INTERFACE)
if(PISSA_MANYLINUX)
  add_library(pissa_newer_libstdcxx STATIC cpp/cmake/manylinux.cc)
  target_link_libraries(pissa_newer_libstdcxx PRIVATE pissa_flags)
  target_link_libraries(pissa_manylinux INTERFACE pissa_newer_libstdcxx)
  target_link_options(pissa_manylinux INTERFACE LINKER:--exclude-libs,libpissa_newer_libstdcxx.a)
endif()
