"""A table: the joint density of the columns of a CSV file, new rows like those there are, and the unlikely rows.

    python examples/table.py

The table is made here: hour, temperature, humidity and wind at a weather station, from a density that is known. Prints
nats per row of the test part (lower is better) beside those of the true density (nothing can be better) and of one
normal, and how likely two rows are of which one cannot be. Writes ``weather.csv``, ``new_rows.csv`` and the pictures
``corner.png`` (columns and pairs of them: data and samples) and ``training.png``.
"""

import argparse
import math
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal, Normal

from nfkernels import plot
from nfkernels.models import NSF
from nfkernels.nn import TableFlow
from nfkernels.training import evaluate, fit, load_table


def weather(hour: Tensor) -> tuple[Normal, LogNormal]:
    """Temperature and wind at an hour: warm and windy in the afternoon."""
    afternoon = torch.cos((hour - 15) * math.pi / 12)
    return Normal(12 + 6 * afternoon, 2 + afternoon), LogNormal(0.6 + 0.4 * afternoon, 0.5)


def humidity(temperature: Tensor) -> Normal:
    """In per cent: the warmer, the drier."""
    return Normal(75 - 2.5 * (temperature - 12), 5.0)


def draw(count: int) -> Tensor:
    """Rows ``[count, 4]``: hour, temperature, humidity, wind."""
    hour = 24 * torch.rand(count)
    temperature, wind = (d.sample() for d in weather(hour))
    return torch.stack([hour, temperature, humidity(temperature).sample(), wind], 1)


def true_log_prob(rows: Tensor) -> Tensor:
    hour, temperature, damp, speed = rows.unbind(1)
    of_temperature, of_wind = weather(hour)
    log_p = of_temperature.log_prob(temperature) + humidity(temperature).log_prob(damp) + of_wind.log_prob(speed)
    return log_p - math.log(24)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("table"), help="folder for what is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    names = ["hour", "temperature", "humidity", "wind"]
    csv = {"fmt": "%.3f", "delimiter": ",", "header": ",".join(names), "comments": ""}
    numpy.savetxt(options.out / "weather.csv", draw(20_000).numpy(), **csv)

    # From here on, give the name of your own file. An hour is an angle: 23:59 is next to 0:00.
    table = load_table(options.out / "weather.csv", circular=["hour=24"])
    print("\n".join(table.notes))
    circular = [i for i, column in enumerate(table.data) if column.period]
    inner = NSF(len(table.data), layers=4, hidden=32, circular=circular)  # sees columns of mean 0 and variance 1
    flow = TableFlow(inner, [column.facts() for column in table.columns])  # takes and gives rows in data units
    result = fit(
        flow, table.train.samples(), validation=table.validation.samples(), steps=options.steps, batch_size=512,
        lr=3e-3, weight_decay=0.0, seed=options.seed,
    )  # fmt: skip

    train, held_out, test = (part.values for part in (table.train, table.validation, table.test))
    normal = MultivariateNormal(train.mean(0), train.T.cov())
    found = evaluate(flow, test)
    numbers = {
        "flow": found.mean,
        "truth": -true_log_prob(test).mean().item(),
        "normal": -normal.log_prob(test).mean().item(),
    }
    print("nats per row:", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    print(f"standard error of the flow's: {found.standard_error:.3f}")

    # Every single number of the second row is common; together they are not.
    day, night = torch.tensor([[15.0, 20.0, 55.0, 2.7], [3.0, 20.0, 55.0, 2.7]])
    numbers["day"], numbers["night"] = flow.log_prob(torch.stack([day, night])).tolist()
    print(f"log-density of 20 degrees at 15 h: {numbers['day']:.1f}, at 3 h: {numbers['night']:.1f}")

    samples = flow.sample(len(test))
    numpy.savetxt(options.out / "new_rows.csv", samples.numpy(), **csv)
    print(f"wrote {options.out / 'weather.csv'}\nwrote {options.out / 'new_rows.csv'}")
    pictures = {
        "corner": plot.corner(test, samples, names=names),
        "training": plot.training_curve(
            result.history, unit="nats", baselines={"true density": -true_log_prob(held_out).mean().item()}
        ),
    }
    for name, figure in pictures.items():
        plot.save(figure, options.out / f"{name}.png")
        print(f"wrote {options.out / name}.png")
    return numbers


if __name__ == "__main__":
    main()
