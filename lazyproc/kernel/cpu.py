"""What the processor can do, as CPUID says; a process may use all of it, so a destination must have it too."""

from __future__ import annotations

from collections.abc import Mapping

from lazyproc.kernel import xfeatures
from lazyproc.kernel.sys import cpuid

# (leaf, subleaf, register, bits that say nothing about instructions a process may use)
_LEAVES = (
    (0x1, 0, 2, 1 << 31),  # ecx; 31: runs under a hypervisor
    (0x1, 0, 3, 0),  # edx
    (0x7, 0, 1, 0),
    (0x7, 0, 2, 0),
    (0x7, 0, 3, 0),
    (0x7, 1, 0, 0),
    (0xD, 0, 0, 0),  # xsave components, low half
    (0xD, 1, 0, 0),
    (0x80000001, 0, 2, 0),
    (0x80000001, 0, 3, 0),
)
_REGISTERS = ("eax", "ebx", "ecx", "edx")


def features() -> dict[str, int]:
    """Feature words by name, "7.0.ebx" being leaf 7 subleaf 0 (Intel SDM vol. 2A, CPUID).

    State that a process has to ask the kernel for counts where the kernel gives it.
    """
    words = {
        f"{leaf:x}.{sub}.{_REGISTERS[register]}": cpuid(leaf, sub)[register] & ~ignored
        for leaf, sub, register, ignored in _LEAVES
    }
    words["d.0.eax"] &= ~xfeatures.ON_REQUEST | xfeatures.supported()
    return words


def missing(wanted: Mapping[str, int], have: Mapping[str, int]) -> dict[str, int]:
    """Bits of `wanted` that `have` lacks, by word."""
    lacking = {name: bits & ~have.get(name, 0) for name, bits in wanted.items()}
    return {name: bits for name, bits in lacking.items() if bits}


def possible_cpus() -> int:
    """How many processors this host could ever have: num_possible_cpus() of the kernel."""
    with open("/sys/devices/system/cpu/possible") as file:
        ranges = [part.partition("-") for part in file.read().strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
