"""Run the command line as `python -m self_attention_guidance.cli`."""

import sys

from . import main

sys.exit(main())
