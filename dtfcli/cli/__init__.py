"""The command line: the only room that knows a terminal.

In: arguments. Out: what people look at (tables, text, JSON on stdout; progress and remarks on stderr).
`app` lists the commands. A command lies in one file: its options, checks, and the call of the room that does the work.
`<command>_view` draws that command's results. `options` holds what commands share, `render` how everything is drawn.
"""
