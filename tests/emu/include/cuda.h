// All of it is in emu.h, which is force-included.
