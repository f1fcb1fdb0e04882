"""A QEMU is one more process: what of it is dumped, and the empty shell that takes it in, by QMP.

Pages come and go as everywhere: out of the process's memory, into the memory of another.
"""
