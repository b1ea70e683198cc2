"""How the ranks of a run meet: through a store that, on one machine, no other machine can reach.

torch's own store listens to the whole network, without any authentication: whoever reaches its port can end a run or
speak as one of its ranks. torchrun's store and the stores of runs on several machines are of that kind; there the
network must keep strangers out.
"""

import errno
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from maedistill.errors import ConfigError, PeerError, UserError


def open_local_store(ranks: int, timeout: timedelta) -> dist.Store | None:
    """Return a store that only this machine can reach; None for several machines, or if torchrun brings the store.

    gloo listens to the network, too: on one machine it uses the loopback interface. Raises ConfigError if the port is
    in use.
    """
    if not is_one_machine(os.environ):
        return None
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if ranks == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port, is_first = "127.0.0.1", int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    os.environ["MASTER_ADDR"] = address
    listener = None
    if is_first:
        try:
            listener = socket.create_server((address, port)).detach()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise _port_in_use(port) from error
    return dist.TCPStore(address, port, ranks, is_first, timeout, master_listen_fd=listener)


def is_one_machine(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher says that all ranks are on this machine."""
    ranks = environ["WORLD_SIZE"]
    counts = (environ.get("LOCAL_WORLD_SIZE"), environ.get("LOCAL_SIZE"))  # torchrun, deepspeed
    return (
        ranks == "1" or ranks in counts or (environ.get("SLURM_STEP_NUM_NODES") == "1" and "SLURM_STEP_ID" in environ)
    )


def rendezvous_error(error: Exception, ranks: int, timeout_seconds: int) -> UserError:
    """Return the error for ranks that did not meet: a port in use, an address out of reach, or ranks that are late."""
    reason, port = str(error).splitlines()[0], os.environ["MASTER_PORT"]
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return _port_in_use(int(port))
    if isinstance(error, dist.DistNetworkError) and os.environ["RANK"] != "0":
        return PeerError(
            f"rank {os.environ['RANK']} does not reach rank 0 at {place} within {timeout_seconds} s ({reason})",
            "check that rank 0 has started, that its host name is known here, and that no firewall is in the way",
        )
    return PeerError(
        f"the {ranks} processes of this run did not find each other within {timeout_seconds} s at {place} ({reason})",
        "start every rank (torchrun, deepspeed, or srun with one task per GPU) and let them reach that address; for "
        "one process in a shell of srun unset SLURM_STEP_ID",
    )


def _port_in_use(port: int) -> ConfigError:
    return ConfigError(
        f"port {port} of this machine, where the ranks would meet, is in use by another program",
        "use another: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N",
    )
