"""`python -m finetune_nb`, by which torchrun and `accelerate launch` start the command."""

from .cli import main

raise SystemExit(main())
