"""The command line: ``python -m vitlib``. Heavy imports wait for the command that needs them."""

import atexit
import gc
import os
import shlex
import signal
import sys
from pathlib import Path

import click

TRAINING_COMMANDS = ("pretrain", "finetune")


class OneLineErrors(click.Group):
    """Errors of input, files or missing packages are one line and exit code 2, Ctrl-C is exit code 130, all without a
    traceback."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except BrokenPipeError:  # the reader, say head, has seen enough; click ends quietly
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:
            failure = click.ClickException(str(error))
            failure.exit_code = 2
            raise failure from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)

    def list_commands(self, context: click.Context) -> list[str]:
        return [*super().list_commands(context), *TRAINING_COMMANDS]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in TRAINING_COMMANDS:
            return super().get_command(context, name)
        from vitlib.course import commands  # loads torch, which the other commands need not wait for

        return getattr(commands, f"{name}_command")


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """The Vision Transformer course: run its notebooks, fetch its images, train models."""
    if context.invoked_subcommand != "doctor":  # it says what notebooks meet that Jupyter starts
        _compute_on_granted_cores()


def _compute_on_granted_cores() -> None:
    """Here and in all that is started from here. torch counts the cores of the machine; where a container grants fewer,
    its threads would wait for each other, and training would take many times as long.
    """
    from vitlib.course.doctor import granted_cores, usable_cores

    granted = granted_cores()
    if granted < usable_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(granted))


@main.command()
@click.option("--only", metavar="03,04", help="Numbers or names of the notebooks to run; all without it.")
@click.option("--parameters", metavar="FILE", type=click.Path(path_type=Path), help="YAML file of parameters.")
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="One parameter; wins over FILE.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the run (see above).")
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=3600, show_default=True,
    help="Longest time for one cell; 0 for no limit.",
)  # fmt: skip
@click.option(
    "--notebooks", metavar="DIR", type=click.Path(path_type=Path),
    help="Folder of the notebooks; the course's own without it.",
)  # fmt: skip
def run(only, parameters, given, out, timeout, notebooks) -> None:
    """Run notebooks in order through papermill, and print a table of what came out.

    Without --out the run goes to runs/class, to runs/<FILE's name> with --parameters, and to runs/custom with -p.
    The exit code is 0 when every notebook ran through, 1 when one failed, 2 for a wrong command, 130 after Ctrl-C.
    """
    from vitlib.course import runner

    if out is None:
        out = Path("runs") / ("custom" if given else parameters.stem if parameters else "class")
    outcomes = runner.run_course(
        out,
        notebooks=notebooks or runner.COURSE_FOLDER,
        only=[word.strip() for word in only.split(",") if word.strip()] if only else (),
        shared=runner.parameters_from_file(parameters) if parameters else {},
        given=dict(given),
        timeout=timeout or None,
    )
    click.echo(f"\n{runner.summary(outcomes)}\n\nNotebooks and metrics.json are in {out}.")
    statuses = {outcome.status for outcome in outcomes.values()}
    sys.exit(130 if "interrupted" in statuses else 0 if statuses == {"ok"} else 1)


class WordsAfterOption(click.Command):
    """Options that take several words, as in ``--grid seed=0,1 finetune_epochs=1,2``, which click does not know. A
    word without = ends them. Their values reach click as lines of one text."""

    NAMES = ("--grid", "--zip")

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        joined, words = [], iter([*args, None])
        word = next(words)
        while word is not None:
            joined.append(word)
            option, word = word, next(words)
            if option in self.NAMES:
                values = []
                while word is not None and "=" in word and not word.startswith("-"):
                    values.append(word)
                    word = next(words)
                if not values and (word is None or word.startswith("-")):
                    raise click.UsageError(f"{option} says nothing; write for instance {option} seed=0,1,2.", context)
                if values:
                    joined.append("\n".join(values))
        return super().parse_args(context, joined)


@main.command(cls=WordsAfterOption)
@click.argument("notebook", metavar="NOTEBOOK|FILE.yaml", type=click.Path(path_type=Path))
@click.option("--grid", metavar="NAME=A,B ...", multiple=True, help="Values of parameters; each is crossed with all.")
@click.option("--zip", "zips", metavar="NAME=A,B ...", multiple=True, help="Values that go together, first with first.")
@click.option("--parameters", metavar="FILE", type=click.Path(path_type=Path), help="YAML file of common parameters.")
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="A common parameter; wins over FILE.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the sweep (see above).")
@click.option("--dry-run", is_flag=True, help="Print the runs and stop.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler; this machine's cores without it.")
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Runs at a time; by cores and memory without it.")
@click.option("--threads-per-run", "threads", metavar="N", type=click.IntRange(1), help="Without it, cores / workers.")
@click.option(
    "--retries", metavar="N", type=click.IntRange(0, 100), default=0, show_default=True, help="Per failed run."
)
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=3600, show_default=True,
    help="Longest time for one run; 0 for no limit.",
)  # fmt: skip
def sweep(notebook, grid, zips, parameters, given, out, dry_run, scheduler, workers, threads, retries, timeout) -> None:
    """Run NOTEBOOK with every combination of parameters, several at a time, and gather the results.

    FILE.yaml holds the same as the options: notebook, grid, zip and parameters; options win. Without --out the sweep
    goes to runs/sweep-<name of NOTEBOOK or FILE>. There results.csv, results.json and report.html grow beside the
    executed notebooks. The same command again runs what is missing or failed. The exit code is 0 when every run is
    finished, 1 when one failed, 2 for a wrong command, 130 after Ctrl-C.
    """
    from vitlib.course import early

    if not (scheduler or dry_run):
        early.prepare_workers()  # before the imports that take seconds here, too

    from vitlib.course import grid as grids
    from vitlib.course import runner
    from vitlib.course import sweep as sweeps

    if scheduler and workers:
        raise click.UsageError("--workers is about this machine; the scheduler of --scheduler has workers of its own.")
    described = grids.read_grid(notebook)
    described = grids.with_options(
        described,
        grids.parse_axes("\n".join(grid).split("\n") if grid else ()),
        [grids.parse_axes(words.split("\n")) for words in zips],
        runner.parameters_from_file(parameters) if parameters else {},
    )
    plan = grids.make_plan(described, dict(given))
    out = out or Path("runs") / f"sweep-{notebook.stem}"
    if dry_run:
        click.echo(sweeps.preview(plan, out))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a batch job is as gentle as Ctrl-C
    results = sweeps.run_sweep(
        plan, out, scheduler=scheduler, workers=workers, threads=threads, retries=retries, timeout=timeout or None,
        command=shlex.join(["python", "-m", "vitlib", *sys.argv[1:]]), say=click.echo,
    )  # fmt: skip
    click.echo(f"\n{sweeps.summary(results)}\n\nresults.csv, results.json and report.html are in {out}.")
    statuses = {run["status"] for run in results["runs"]}
    sys.exit(130 if "not run" in statuses else 0 if statuses <= {"ok"} else 1)


@main.command()
@click.argument("name")
@click.option("--data-dir", metavar="DIR", help="Where to keep it; VITLIB_DATA or the usual cache without it.")
def download(name, data_dir) -> None:
    """Fetch the images NAME (for instance cifair100), so that notebooks find them without a network."""
    from vitlib.data.images import download as fetch

    fetch(name, data_dir)
    click.echo(f"{name} is ready.")


@main.command()
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "--top", metavar="N", type=click.IntRange(min=1), default=5, show_default=True, help="Classes for each image."
)
@click.option(
    "--batch-size", metavar="N", type=click.IntRange(min=1), default=32, show_default=True, help="Images at a time."
)
def predict(model, images, top, batch_size) -> None:
    """Say which classes MODEL finds most probable for each IMAGE.

    MODEL is a checkpoint, such as finetune's runs/finetune/finetuned.safetensors, or a shipped name such as
    cifar100-small. An image that cannot be read gets one line on stderr, and the others are predicted all the same. The
    exit code is 0 when every image was predicted, 1 when one was not, 2 for a wrong command or MODEL.
    """
    from vitlib.predict import predict_files
    from vitlib.training.devices import resolve_device
    from vitlib.utils import printable
    from vitlib.weights.checkpoint import load_weights

    network, card = load_weights(model)
    complete = True
    for prediction in predict_files(network.to(resolve_device()), card, images, top=top, batch_size=batch_size):
        if prediction.error is not None:
            complete = False
            click.echo(prediction.error, err=True)
            continue
        click.echo(printable(prediction.path))
        for name, probability in prediction.classes:
            click.echo(f"  {probability:6.1%}  {name}")
    sys.exit(0 if complete else 1)


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def export(model, out) -> None:
    """Write MODEL to OUT for programs without vitlib: as ONNX (.onnx) or as a PyTorch program (.pt2).

    MODEL is a checkpoint or a shipped name. OUT takes images as they are decoded, uint8 [batch, channels, height,
    width] in batches of any size, normalises them itself and gives logits [batch, classes]. It is compared with MODEL
    before it is kept. ONNX needs `pip install "vitlib[export]"`.
    """
    from vitlib.export import TOLERANCE, export_model
    from vitlib.weights.checkpoint import load_weights

    network, card = load_weights(model)
    difference = export_model(network, card, out)
    shape = ", ".join(str(network.config[name]) for name in ("num_channels", "image_size", "image_size"))
    click.echo(
        f"{out} ({out.stat().st_size / 1e6:.1f} MB) takes uint8 images [batch, {shape}] and gives logits [batch, "
        f"{network.config['num_classes']}]; on random images they differ from the model's by at most {difference:.1e} "
        f"(allowed: {TOLERANCE:g})."
    )


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--parameters", metavar="FILE", type=click.Path(path_type=Path),
    help="YAML file of parameters; the course's smoke.yaml without it.",
)  # fmt: skip
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="One parameter; wins over FILE.")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), default=Path("runs/grades"), show_default=True,
    help="Folder for grades.csv and the executed copies.",
)  # fmt: skip
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Longest time for one notebook.",
)  # fmt: skip
@click.option(
    "--memory", metavar="GIB", type=click.FloatRange(min=0, min_open=True), default=4, show_default=True,
    help="Most memory for one notebook.",
)  # fmt: skip
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="How many at once.")
@click.option(
    "--notebooks", metavar="DIR", type=click.Path(path_type=Path),
    help="Folder of the course's notebooks; the course's own without it.",
)  # fmt: skip
def grade(folder, parameters, given, out, timeout, memory, jobs, notebooks) -> None:
    """Run the students' notebooks in DIR with strict checks, and print a table of who passed what.

    DIR holds ada/01_patching.ipynb, 01_patching_ada.ipynb or the like. The first lines say what students' code is kept
    from on this machine, and what not; use a container for people you do not know. The exit code is 0 when every
    notebook ran to its end, whatever the marks, 1 when one did not, 2 for a wrong command, 130 after Ctrl-C (grades.csv
    keeps what was done).
    """
    from vitlib.course import grade as grading

    found = grading.grade_folder(
        folder, out, notebooks=notebooks or grading.COURSE_FOLDER, parameters=parameters, given=dict(given),
        timeout=timeout, memory=memory, jobs=jobs, say=click.echo,
    )  # fmt: skip
    click.echo(f"\n{grading.tables(found, folder)}\ngrades.csv and the executed copies are in {out}.")
    sys.exit(1 if any(one.note for one in found) else 0)


@main.command()
def doctor() -> None:
    """Say what this machine can do and what is missing."""
    from vitlib.course import doctor

    facts = doctor.gather()
    click.echo(doctor.report(facts))
    sys.exit(0 if doctor.can_run(facts) else 1)


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else the modules of PyTorch are searched for garbage at the end, for a second
    main(prog_name="python -m vitlib")
