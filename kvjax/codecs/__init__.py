"""The codecs by name, one file each: `NAME(role, **arguments)` registers itself in `kvjax.codec.CODECS`.

A new codec is a new file here and a test; nothing else is edited. Its arguments are what people type in a policy,
`NAME(argument=value)`: their annotations and defaults are read from the function's signature.
"""
