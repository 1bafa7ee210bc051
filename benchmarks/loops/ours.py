"""Meristem's command line, with marks: `python ours.py pretrain volume/mae --data … --out …`."""

import marks

marks.watch()

from meristem.cli import main  # noqa: E402  (after the marks: its imports count)

main()
