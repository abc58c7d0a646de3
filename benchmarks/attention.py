"""CPU attention, dilated against dense: the script of ``dilcompile.bench``; an installed wheel has ``dilcompile bench``.

OMP_NUM_THREADS=2 python benchmarks/attention.py --lengths 4096 16384 --dtypes float32 bfloat16 --backward
"""

from dilcompile.bench import main

if __name__ == "__main__":
    main()
