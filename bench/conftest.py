"""Prints the paired ratios below pytest-benchmark's own table, and keeps the machine's name out of its JSON."""

from __future__ import annotations

import os

import fastnlcg
import pytest
import torch


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info.update(
        torch=torch.__version__,
        fastnlcg=fastnlcg.__version__,
        threads=torch.get_num_threads(),
        instruction_set=os.environ.get("FASTNLCG_ISA") or fastnlcg._native.instruction_set(),
    )


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Keeps what a reader compares: one row an optimizer and list."""
    keys = ("median", "iqr", "min", "max", "rounds")
    output_json["benchmarks"] = [
        {**bench["extra_info"], "seconds": {key: bench["stats"][key] for key in keys}}
        for bench in output_json["benchmarks"]
    ]
    output_json["command"] = "make bench"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    if not benchmarks:
        return
    tr = terminalreporter
    tr.section("step time, ratios to the peers of the same rounds (medians)")
    tr.write_line(
        f"threads {torch.get_num_threads()}, {fastnlcg._native.instruction_set()}, torch {torch.__version__}; "
        "'temp' is memory that appears during a step, in bytes per parameter; 'of copy' is counted traffic per second "
        "over that of a measured copy"
    )
    tr.write_line(
        f"{'list':<10}{'optimizer':<22}{'ms':>10}{'/ AdamW fused':>15}{'/ SGD fused':>13}{'/ RMSProp':>11}"
        f"{'temp B/p':>10}{'of copy':>9}"
    )
    for bench in benchmarks:
        x = bench.extra_info
        copy = f"{x['of_copy']:.2f}" if x["of_copy"] else "-"
        tr.write_line(
            f"{x['list']:<10}{x['optimizer']:<22}{x['median_ms']:>10.3f}{x['ratio_to_adamw_fused']:>15.2f}"
            f"{x['ratio_to_sgd_fused']:>13.2f}{x['ratio_to_rmsprop']:>11.2f}{x['temporary_bytes_per_param']:>10.2f}{copy:>9}"
        )
