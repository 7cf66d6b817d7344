"""What the compiled kernels do: their machine code, read instruction by instruction with its control codes.

Since Volta an instruction carries, in the high word of its 128 bits, which of six scoreboards it holds until its result
is there (bits 46-48; 7: none) and which it waits for (52-57). So the code shows which loads are in flight together,
without a GPU. nvdisasm prints the words; NVIDIA does not document them, but Jia et al. do (arXiv:1804.06826, section
2.1).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Streams that a pass may load, options and weight decay included: the loads of four elements.
LOADS = {
    "PlainDots": 3,
    "PlainMove": 3,
    "CurvatureDot": 3,
    "CurvatureAndDots": 5,
    "CurvatureAndMove": 5,
    "AdamDots": 3,
    "AdamMove": 4,
    "MuonDots": 3,
    "MuonMove": 4,
}
ENDS = frozenset(("BRA", "BRX", "JMP", "EXIT", "BAR", "CALL", "RET"))


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the path or from PyPI (nvidia-cuda-nvdisasm, nvidia-cuda-cuobjdump)."""
    found = [*Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}")]
    return shutil.which(name) or (str(found[0]) if found else None)


@dataclass
class Instruction:
    """One, without its predicate."""

    address: int
    text: str
    predicate: str  # "@P0", "@!UP1", or ""
    holds: int  # scoreboard, until the result is there; 7: none
    waits: int  # mask of scoreboards
    target: int | None = None  # of a jump
    jumped_from: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """LDG.E.NA.128, DFMA, ..."""
        return self.text.split(" ", 1)[0]

    @property
    def opcode(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def stream_bytes(self) -> int:
        """Bytes that a load of a stream brings a thread; 0 for other instructions. The hints that tile.cuh gives those
        loads, not to be allocated in L1 or to be evicted first, identify them."""
        name = self.name
        if self.opcode != "LDG" or not (".NA" in name or ".EF" in name):
            return 0
        return 16 if ".128" in name else 8 if ".64" in name else 2 if ".U16" in name else 4


@dataclass
class Group:
    """Loads in flight together."""

    loads: list[Instruction]
    until: str  # what waits for the first of them, or ends the straight line

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted(i.stream_bytes for i in self.loads))


@dataclass
class Kernel:
    name: str  # step_pass<float, AdamDots<float>, AdamMove<float>>
    registers: int
    code: list[Instruction] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        return Counter(i.opcode for i in self.code)

    def groups(self) -> list[Group]:
        """Loads of streams, in the order of the code. A group ends at the instruction that waits for its first load, at
        the end of the code, at a jump back, and at the target of a jump from elsewhere. A branch over some of the loads
        ends nothing, because no instruction waits."""
        found: list[Group] = []
        now: list[Instruction] = []
        held = 0

        def close(at: Instruction) -> None:
            nonlocal now, held
            if now:
                found.append(Group(now, f"{at.address:x}: {at.text}"))
            now, held = [], 0

        for i in self.code:
            arrives = bool(now) and any(not now[0].address <= source < i.address for source in i.jumped_from)
            branches = i.opcode == "BRA" and bool(i.predicate) and (i.target or 0) > i.address
            if arrives or i.waits & held or (i.opcode in ENDS and not branches):
                close(i)
            if i.stream_bytes:
                now.append(i)
                held |= 1 << i.holds
        close(self.code[-1])
        return found


def short(names: Sequence[str]) -> list[str]:
    """Demangled names without namespaces, arguments and return type."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    out = []
    for name in text.splitlines():
        name = name.replace("fastnlcg::", "").replace("(anonymous namespace)::", "").replace(" >", ">")
        out.append(name.removeprefix("void ").split("(", 1)[0])
    return out


LINE = re.compile(
    r"(?P<labels>(?:^\.L\w+:\s*\n)*)^\s*/\*(?P<address>[0-9a-f]{4,5})\*/\s+(?P<text>.*?)\s*;"
    r"\s+/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def read(listing: str, resources: str) -> dict[str, Kernel]:
    """Kernels by name, from what nvdisasm -c -hex and cuobjdump --dump-resource-usage print."""
    registers = {name: int(n) for name, n in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", resources)}
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", listing, flags=re.MULTILINE)[1:]
    mangled, bodies = sections[::2], sections[1::2]
    kernels = {}
    for name, title, body in zip(mangled, short(mangled), bodies, strict=True):
        kernel = Kernel(title, registers[name])
        places: dict[str, int] = {}
        by_address: dict[int, Instruction] = {}
        for m in LINE.finditer(body):
            text = m["text"].lstrip("{ ").strip()
            predicate = ""
            if text.startswith("@"):
                predicate, text = text.split(" ", 1)
            control = int(m["high"], 16) >> 41
            i = Instruction(int(m["address"], 16), text.strip(), predicate, control >> 5 & 7, control >> 11 & 63)
            places |= dict.fromkeys(re.findall(r"\.L\w+", m["labels"]), i.address)
            kernel.code.append(i)
            by_address[i.address] = i
        for i in kernel.code:
            if i.opcode in ENDS and (to := re.search(r"`\((\.L\w+)\)", i.text)) and to[1] in places:
                i.target = places[to[1]]
                by_address[i.target].jumped_from.append(i.address)
        kernels[title] = kernel
    return kernels


def kernels_of(module: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels in a compiled module for an architecture, such as "90"; empty if it holds none."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise RuntimeError("needs cuobjdump and nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        extract = [cuobjdump, "--extract-elf", f".sm_{architecture}.", str(module.resolve())]
        subprocess.run(extract, cwd=folder, capture_output=True, check=False)
        found = {}
        for cubin in Path(folder).glob("*.cubin"):
            listing = subprocess.run([nvdisasm, "-c", "-hex", cubin], capture_output=True, text=True, check=True).stdout
            usage = [cuobjdump, "--dump-resource-usage", str(cubin)]
            resources = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
            found |= read(listing, resources)
        return found


def ptx_of(module: Path) -> str:
    """The portable code in a compiled module, which a newer GPU's driver compiles; "" if it holds none."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError("needs cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump, "--extract-ptx", "all", str(module.resolve())], cwd=folder, capture_output=True, check=False
        )
        return "".join(file.read_text() for file in Path(folder).glob("*.ptx"))


def module() -> Path:
    """The installed one."""
    from fastnlcg import _core

    return Path(_core.__file__)


if __name__ == "__main__":
    for kernel in kernels_of(module(), sys.argv[1] if len(sys.argv) > 1 else "90").values():
        if any(i.stream_bytes for i in kernel.code):
            print(f"{kernel.name}: {kernel.registers} registers, {len(kernel.code)} instructions")
            for group in kernel.groups():
                print("   ", *group.widths, " until ", group.until)
