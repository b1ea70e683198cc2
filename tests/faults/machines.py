"""Two machines on one: two network namespaces with a cable between them, made without root.

Each is held by a sleeping process and gone when that is; nothing outlives the tests. Machine 0 has the address
10.0.0.1, machine 1 10.0.0.2, and both their own loopback; they share the disk.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

HOLD = ["sh", "-c", "echo ready; exec sleep 3600"]
ENDS = ("cable0", "cable1")  # of the cable, by machine


class Unavailable(Exception):
    """This system does not permit namespaces, or has no tools for them; says why."""


class Machines:
    """The two machines, switched on and connected."""

    def __init__(self) -> None:
        self.holders: list[subprocess.Popen] = []
        try:
            self._hold(["unshare", "--user", "--map-root-user", "--net", *HOLD])
            self._hold([*self.enter(0), "unshare", "--net", *HOLD])
            self.ip(
                0, "link", "add", ENDS[0], "type", "veth", "peer", "name", ENDS[1], "netns", str(self.holders[1].pid)
            )
            for machine, end in enumerate(ENDS):
                self.ip(machine, "address", "add", f"10.0.0.{machine + 1}/24", "dev", end)
                self.ip(machine, "link", "set", end, "up")
                self.ip(machine, "link", "set", "lo", "up")
        except (FileNotFoundError, Unavailable, subprocess.CalledProcessError) as error:
            self.close()
            raise Unavailable(f"no network namespaces here: {error}") from error

    def _hold(self, command: list[str]) -> None:
        """Start the process that a namespace lives by."""
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.holders.append(holder)
        if holder.stdout.readline() != "ready\n":
            raise Unavailable(holder.stderr.read().strip())

    def enter(self, machine: int) -> list[str]:
        """What comes before a command that shall run on a machine."""
        target = str(self.holders[machine].pid)
        return ["nsenter", "--target", target, "--user", "--net", "--preserve-credentials"]

    def ip(self, machine: int, *words: str) -> None:
        """Run `ip WORDS` on a machine."""
        subprocess.run([*self.enter(machine), "ip", *words], check=True, capture_output=True, text=True)

    def torchrun(self, machine: int, *command: Any, **variables: str) -> subprocess.Popen:
        """Start one rank on a machine, of two machines in all."""
        nodes = ["--nnodes=2", f"--node-rank={machine}", "--nproc-per-node=1"]
        master = ["--master-addr=10.0.0.1", "--master-port=29500"]
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
        return subprocess.Popen(
            [*self.enter(machine), *map(str, (command[0], *nodes, *master, *command[1:]))],
            env=outside | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ENDS[machine]} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def plug(self, connected: bool) -> None:
        """Connect or cut the cable."""
        self.ip(1, "link", "set", ENDS[1], "up" if connected else "down")

    def switch_off(self, machine: int) -> None:
        """Kill everything that runs on a machine, at once as far as one can."""
        home = os.readlink(f"/proc/{self.holders[machine].pid}/ns/net")
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) != self.holders[machine].pid and _network(process) == home:
                os.kill(int(process.name), signal.SIGKILL)

    def close(self) -> None:
        """Both machines go, with everything on them."""
        for machine, holder in reversed(list(enumerate(self.holders))):
            if holder.poll() is None:
                self.switch_off(machine)
            holder.kill()
            holder.communicate()


def _network(process: Path) -> str | None:
    """The network namespace of a process, None where it has ended or is not ours to look at."""
    try:
        return os.readlink(process / "ns/net")
    except OSError:
        return None
