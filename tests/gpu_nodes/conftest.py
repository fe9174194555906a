"""Virtual nodes on the GPUs of one machine.

bash launch/gpu.sh -n 8 --sms 12 python -m mpi4py -m pytest --with-mpi -x tests/gpu_nodes
"""

import sys
from pathlib import Path

for place in ("mpi", "gpu"):
    sys.path.insert(0, str(Path(__file__).parents[1] / place))
