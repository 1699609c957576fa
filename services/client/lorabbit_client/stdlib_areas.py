"""Which area of the library a standard-library module belongs to.

The table follows the chapters of Python's library reference, folded into ten areas. The longest
dotted prefix wins, so one module of a package may stand elsewhere than the package. It holds the
modules of every Python since 3.11, also those that later versions dropped; a module that is not
here (machine-made tables, Easter eggs, shims) gives no examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_MODULES = {
    "concurrency": """
        _threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess
        threading
    """,
    "data types": """
        _collections_abc _py_abc _pydatetime _strptime _weakrefset abc array bisect calendar collections copy copyreg
        dataclasses datetime enum functools graphlib heapq itertools operator pprint reprlib types typing uuid weakref
        zoneinfo
    """,
    "files and OS": """
        _compression _pyio bz2 compression crypt ctypes dbm filecmp fileinput fnmatch genericpath getpass glob gzip
        hashlib hmac io linecache lzma ntpath nturl2path os pathlib pickle pipes platform posixpath pty secrets shelve
        shutil sqlite3 stat tarfile tempfile tty zipfile
    """,
    "language services": """
        __future__ _ast_unparse _bootsubprocess _compat_pickle _opcode_metadata _pylong ast annotationlib atexit code
        codeop compileall contextlib dis imp importlib inspect keyword lib2to3 modulefinder opcode pickletools
        py_compile pyclbr runpy symtable tabnanny token tokenize zipimport
    """,
    "networking": """
        asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib webbrowser wsgiref xmlrpc
    """,
    "numbers": """
        _pydecimal colorsys decimal fractions numbers random statistics
    """,
    "packaging": """
        _aix_support _android_support _apple_support _distutils_system_mod _ios_support _osx_support distutils
        ensurepip importlib.metadata importlib.resources pkgutil site sysconfig venv zipapp
    """,
    "testing and debugging": """
        bdb cProfile cgitb doctest faulthandler logging pdb profile profiling pstats pydoc timeit trace traceback
        tracemalloc unittest warnings
    """,
    "text and formats": """
        _markupbase aifc base64 chunk codecs configparser csv difflib email encodings gettext html imghdr json locale
        mailbox mailcap mimetypes netrc plistlib quopri re shlex sndhdr sre_compile sre_constants sre_parse string
        stringprep struct sunau textwrap tomllib uu wave xdrlib xml
    """,
    "user interfaces": """
        _colorize _pyrepl _sitebuiltins argparse cmd curses getopt idlelib optparse rlcompleter tkinter turtle
        turtledemo
    """,
}

AREAS: tuple[str, ...] = tuple(_MODULES)
"""The ten areas in label order."""

AREA_OF: Mapping[str, str] = MappingProxyType(
    {prefix: area for area, prefixes in _MODULES.items() for prefix in prefixes.split()}
)
"""Module or dotted prefix to area."""


def area_of(module: str) -> str | None:
    """Return the area of a dotted module name by its longest known prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        area = AREA_OF.get(".".join(parts[:length]))
        if area is not None:
            return area
    return None
