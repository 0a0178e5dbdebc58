"""Options of how answers are sampled, shared by the commands that have them."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="Of all answers, 0 is greedy (default of all five: generation_config.json)."
    ),
]
TopP = Annotated[float | None, typer.Option(help="Share of the probability kept.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Tokens kept, 0 for all.")]
MinP = Annotated[
    float | None, typer.Option(help="Least probability relative to the likeliest token.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: tokens that came before are less likely.")
]
