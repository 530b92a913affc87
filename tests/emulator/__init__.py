"""The CUDA emulator for tests: see cuda_emulator.h for what it is, build.py for how it is built, emulated.py for its use."""
