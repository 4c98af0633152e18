"""How much memory there is."""

import os
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device: free (CUDA), or available without swapping and within the control
    group (Linux).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS, Windows: what is installed is all that the standard library knows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when memory is wanted
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cache)
    return free
