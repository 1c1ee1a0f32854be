// What Python's headers ask of pyconfig.h, for Windows on x86-64 (LLP64). python.org's own is in its installer for
// Windows alone.
#pragma once

#define MS_WINDOWS
#define MS_WIN64

#define Py_ENABLE_SHARED 1  // functions and data are imported from python3XY.dll
#define HAVE_DECLSPEC_DLL 1

#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_PID_T 4
#define SIZEOF_TIME_T 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_FLOAT 4
#define SIZEOF_DOUBLE 8

#define HAVE_LONG_LONG 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_WCHAR_H 1
#define HAVE_USABLE_WCHAR_T 1
#define NT_THREADS 1
#define WITH_DOC_STRINGS 1
