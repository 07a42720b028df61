"""The one part that pyproject.toml cannot state: the native kernels of the CPU, built where there is a compiler."""

from setuptools import Extension, setup

# Portable code, each instruction set behind a run-time check; no fused multiply-adds but those written (adam.cpp).
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-pthread"]

setup(
    ext_modules=[
        # Plain C functions for ctypes, not a module to import.
        Extension(
            "slidetune.runtime._adam",
            sources=["runtime/native/adam.cpp", "runtime/native/rows.cpp"],
            depends=["runtime/native/halves.hpp", "runtime/native/pool.hpp"],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
