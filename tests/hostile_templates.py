"""Chat templates that mean harm: what reaches for Python, and what asks for more than there is."""

REACHING = (  # for Python's insides, files, the environment
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[40]('/etc/passwd').read() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('__mro__') }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(messages) }}",
    "{{ [\"{0.__class__}\"]|map('format', 1)|list }}",
    "{{ (['{0.__class__.__mro__}']|map(attribute='format')|list)[0](1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].popen('id').read() }}",
    "{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{{ config }}{{ request.application.__globals__ }}{{ get_flashed_messages.__globals__ }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='assistant') }}",
    "{{ messages.sort() }}",
    "{{ (messages|first).pop('content') }}",
    "{% macro a() %}{{ caller.__globals__ }}{% endmacro %}{% call a() %}{% endcall %}",
    "{{ x.y.z }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "{{ (messages|tojson).__class__.__init__.__globals__ }}",
    "{% set f = ''.join %}{{ f.__self__.__class__ }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{{ varargs.__class__ }}{{ kwargs.__class__ }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__')|list }}",
    "{{ messages|sum(attribute='__class__') }}",
)
GREEDY = (  # for memory, for time, for output
    "{{ 'a' * 10 ** 10 }}",
    "{{ ['a'] * 10 ** 10 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ (7 ** (10 ** 6)) ** 100 }}",
    "{{ 1 << (10 ** 11) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ 'a'|center(10 ** 10) }}",
    "{{ ('\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "{{ 'a'|indent(10 ** 10, true) }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ 'a' * 10 ** 7 }}",
    "{{ range(99999)|list|string * 100 }}",
    "{{ lipsum(100000) }}",
    "{% set x = 'a' * 10 ** 5 %}{{ x|wordwrap(1)|wordwrap(1)|urlize|urlize|urlize * 100 }}",
    "{{ 'a ' * 10 ** 6 | wordcount }}{{ ('a' * 10 ** 7)|title|upper|lower|reverse|list|sort|join }}",
    "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 'a'" + "|upper" * 20000 + " }}",
    "{% if messages|length > 1 %}{{ 'a' * 10 ** 10 }}{% endif %}",  # waits for its chat
)


def serve_python() -> None:
    "The process of `sandbox` when a template has got out of Jinja: it is Python, and what it says or raises is the text."
    import ctypes
    import os
    import signal
    import socket
    import sqlite3
    import subprocess
    import time

    from finetune_nb import sandbox

    def unbounded():
        import resource

        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)

    within = {"os": os, "socket": socket, "sqlite3": sqlite3, "subprocess": subprocess, "ctypes": ctypes, "time": time, "kept": [], "unbounded": unbounded}

    def answer(request):
        try:
            said = eval(request["template"], within)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        return said if isinstance(said, dict) else {"texts": [str(said)] * len(request["chats"])}

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that was started by hand
    sandbox._answer = answer
    sandbox.serve()
