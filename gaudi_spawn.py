"""Runs a script on several Gaudi cards, of one node or many.

One node:      python gaudi_spawn.py --world_size 8 --use_deepspeed sft.py --model_name_or_path ...
Several nodes: python gaudi_spawn.py --hostfile hosts.txt --use_mpi sft.py --model_name_or_path ...

On any computer, --rehearse shows beforehand what a command will do; --graph_report FILE shows what it took.
With neither --use_deepspeed nor --use_mpi, torch.distributed.run starts the ranks.
"""

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path

from align.cli import SWITCH, Parser, run_script
from align.errors import InputError
from align.launch.engines import ENGINES, Run, clean_environment
from align.launch.nodes import (
    check_script,
    choose_port,
    describe,
    exported_variables,
    inspect_nodes,
    is_this_host,
    read_hostfile,
    take_token,
)
from align.launch.supervision import Supervisor
from align.ranges import limit
from align.rehearsal import measuring, rehearse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="gaudi_spawn.py [flags] script.py [its flags]")
    parser.add_argument("--world_size", type=int, help="number of cards; default 1, or all slots of the hostfile")
    parser.add_argument("--hostfile", help="file with a line `host slots=8` for each node")
    parser.add_argument("--use_deepspeed", **SWITCH, help="let DeepSpeed's launcher start the ranks")
    parser.add_argument("--use_mpi", **SWITCH, help="let Open MPI start the ranks")
    parser.add_argument(
        "--master_port", type=int, help="port where the ranks meet, on rank 0's node; default a free one"
    )
    parser.add_argument(
        "--export", action="append", default=[], metavar="NAME", help="one more variable for ranks on other nodes"
    )
    parser.add_argument("--tag_output", **SWITCH, help="begin the output lines of rank n > 0 with [rank n]")
    parser.add_argument(
        "--grace_period",
        type=float,
        default=60,
        help="seconds that ranks have to finish after SIGINT, SIGTERM, SIGHUP or SIGUSR1",
    )
    parser.add_argument(
        "--stall_timeout",
        type=float,
        default=60,
        help="end a run when no rank has computed, read or written for so many seconds; 0 waits for ever",
    )
    parser.add_argument("--print_command", **SWITCH, help="show what would run and where, and stop")
    parser.add_argument(
        "--graph_report", metavar="FILE", help="write the graphs and the memory that the run took, and print them"
    )
    rehearse.add_flags(parser)
    # Everything from the script on is one positional, so that argparse neither reads nor drops any of it.
    parser.add_argument("script", nargs=argparse.PARSER, metavar="script", help="the script and its arguments")
    limit(parser)
    return parser.parse(arguments)


def plan_run(args: argparse.Namespace) -> Run:
    if args.use_deepspeed and args.use_mpi:
        raise InputError("--use_deepspeed and --use_mpi exclude each other; give one of them")
    if args.hostfile is None:
        nodes = {"localhost": args.world_size or 1}
    else:
        nodes = read_hostfile(args.hostfile, "--hostfile")
        if args.world_size not in (None, sum(nodes.values())):
            raise InputError(
                f"--world_size {args.world_size}, but --hostfile {args.hostfile} has {sum(nodes.values())} slots; "
                "leave --world_size out or make them agree"
            )
        if args.use_mpi:  # which gives this host the first ranks wherever it stands in the file
            nodes = dict(sorted(nodes.items(), key=lambda node: not is_this_host(node[0])))
    check_script(args.script[0])
    if missing := [name for name in args.export if name not in os.environ]:
        raise InputError(f"--export {missing[0]}: no such variable is set")
    script, token = take_token(args.script)
    if token:
        os.environ["HF_TOKEN"] = token
    return Run(
        engine=ENGINES["deepspeed" if args.use_deepspeed else "mpi" if args.use_mpi else "torch"],
        script=script,
        nodes=nodes,
        over_ssh=args.hostfile is not None,
        exports=exported_variables(os.environ, args.export),
        master_port=args.master_port,
        tag_output=args.tag_output,
        grace_period=args.grace_period,
        stall_timeout=args.stall_timeout,
    )


def become_script(run: Run) -> None:
    """Runs the script in place of this process; DeepSpeed asks for the variables of a world even if it has one rank."""
    os.environ.update(environment := clean_environment(os.environ))
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    if run.engine.key == "deepspeed":
        world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": run.master_addr}
        world["MASTER_PORT"] = choose_port(run.master_port)
        os.environ.update({name: str(value) for name, value in world.items()})
    os.execv(sys.executable, [sys.executable, *run.script])


def main() -> None:
    args = parse_arguments()
    if args.rehearse:
        sys.exit(rehearse.rehearse(args, lambda arguments: plan_run(parse_arguments(arguments))))
    run = plan_run(args)
    if args.print_command:
        print(describe(run))
    elif run.is_direct and not args.graph_report:
        become_script(run)
    else:
        code = measure(run, args) if args.graph_report else start_ranks(run)
        # Not sys.exit: while the interpreter ends, a late signal has its default action again, and a run that has
        # succeeded would look killed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_ranks(run: Run) -> int:
    port, cores_per_rank, threads = inspect_nodes(run)
    run.exports.setdefault("OMP_NUM_THREADS", str(threads))
    return Supervisor(run, port).supervise(run.engine.commands(run, port, cores_per_rank))


def measure(run: Run, args: argparse.Namespace) -> int:
    file = Path(args.graph_report)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"--graph_report {file}: name a file in a folder that is there")
    return measuring.run_and_report(run, os.environ, partial(start_ranks, run), file, Path(args.rehearsal_dir))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before ranks run just ends this process
    run_script(main)
