"""Everything to find out on a GPU, in one command that is rehearsed on a CPU.

- `__main__` runs the stages, each in a process of its own, and what `job` offers them; `summary` tells what came out.
- The stages: `environment`, `suite` (tests marked gpu), `bench`, `profiling`, `adapt`.
- `pack` puts together what has to travel to a machine without a network.
"""
