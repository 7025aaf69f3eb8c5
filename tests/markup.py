"""Sixty texts that want to be markup, and what tells whether one of them became it."""

import re

import html5lib

PAYLOADS = (
    "<script>pwn()</script>", "<SCRIPT SRC=//pwn.example/x.js></SCRIPT>", "</script><script>pwn()</script>", "<scr<script>ipt>pwn()</scr</script>ipt>", "<script\x20type=\"text/javascript\">pwn();</script>",
    "<script\x0d>pwn()</script\x09>", "<script/pwn>pwn()</script>", "<!--<script>pwn()//--></script>", "--><script>pwn()</script><!--", "<![CDATA[<script>pwn()</script>]]>",
    "<img src=x onerror=pwn()>", "<img src=\"x\" onerror=\"pwn()\">", "<img/src=x/onerror=pwn()>", "<IMG SRC=javascript:pwn()>", "<img src=`x`onerror=pwn()>",
    "<img src='//pwn.example/a.png'>", "<image src=x onerror=pwn()>", "\"><img src=x onerror=pwn()>", "'><img src=x onerror=pwn()>", "</td></tr></table><img src=x onerror=pwn()>",
    "</pre><img src=x onerror=pwn()>", "</textarea><img src=x onerror=pwn()>", "</title><img src=x onerror=pwn()>", "</style><img src=x onerror=pwn()>", "</summary></details><img src=x onerror=pwn()>",
    "<svg onload=pwn()>", "<svg><script>pwn()</script></svg>", "<svg><animate onbegin=pwn() attributeName=x dur=1s>", "<svg><a xlink:href='javascript:pwn()'><text>x</text></a></svg>", "<math><mtext></mtext><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=pwn()&gt;\">",
    "<iframe src=javascript:pwn()>", "<iframe srcdoc='<script>pwn()</script>'>", "<object data=javascript:pwn()>", "<embed src=//pwn.example>", "<link rel=stylesheet href=//pwn.example/x.css>",
    "<style>@import '//pwn.example/x.css';</style>", "<base href=//pwn.example>", "<meta http-equiv=refresh content='0;url=//pwn.example'>", "<form action=//pwn.example><input name=pwn></form>", "<button formaction=javascript:pwn()>x</button>",
    "<a href=javascript:pwn()>x</a>", "<a href='data:text/html,<script>pwn()</script>'>x</a>", "<body onload=pwn()>", "<video><source onerror=pwn()>", "<audio src=x onerror=pwn()>",
    "<details open ontoggle=pwn()>", "<input autofocus onfocus=pwn()>", "<marquee onstart=pwn()>", "<div style='background:url(//pwn.example)'>", "<b onmouseover=pwn()>x</b>",
    "\" onmouseover=\"pwn()", "' onmouseover='pwn()", "x onmouseover=pwn() y", "`-pwn()-`", "{{pwn()}}${pwn()}<%= pwn() %>",
    "[x](javascript:pwn()) ![y](http://pwn.example/a.png) <http://pwn.example>", "| a | b |\n| --- | --- |\n<img src=x onerror=pwn()>", "```\n<img src=x onerror=pwn()>\n```", "&lt;script&gt;pwn()&lt;/script&gt;&#60;img src=x onerror=pwn()&#62;", "\u202e<\u200bscript>pwn()\x00</script>\ufeff＜script＞pwn()＜/script＞",
)  # fmt: skip
assert len(PAYLOADS) == len(set(PAYLOADS)) == 60
LIVE = {"script", "iframe", "object", "embed", "link", "base", "form", "input", "button", "textarea", "video", "audio", "source", "marquee", "math", "animate", "frame", "frameset", "applet", "a", "image", "template", "noscript"}
TEXT = {"title", "alt", "aria-label", "placeholder"}  # attributes that are only shown


def live_nodes(page):
    "What a browser would do something with, of what our own pages never have; and whatever carries the mark of a payload."
    found = []
    page = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:image/png;base64,AA", page)  # which may spell anything
    for node in html5lib.parse(page, treebuilder="etree", namespaceHTMLElements=False).iter():
        tag = str(node.tag).rpartition("}")[2].lower() if isinstance(node.tag, str) else ""
        attributes = {str(k if isinstance(k, str) else k[-1]).rpartition("}")[2].lower(): v for k, v in node.attrib.items()}
        bad = tag in LIVE or (tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh")
        bad = bad or any(name.startswith("on") or "pwn" in name for name in attributes)
        bad = bad or any("pwn" in value.lower() for name, value in attributes.items() if name not in TEXT)
        bad = bad or any(name in ("src", "href", "srcdoc", "action", "formaction", "data") and not re.match(r"data:image/png;base64,|#", value) for name, value in attributes.items())
        bad = bad or (tag == "style" and re.search(r"pwn|@import|url\(", node.text or "")) or "url(" in attributes.get("style", "")
        found += [(tag, attributes)] if bad else []
    return found


def live_in_markdown(text):
    "Links, pictures and tags of a Markdown text, outside of its blocks of code."
    fence, outside = None, []
    for line in text.split("\n"):
        opened = re.match(r"\s*(`{3,})", line)
        if fence is None and opened:
            fence = opened[1]
        elif fence is not None and line.strip() == fence:
            fence = None
        elif fence is None:
            outside.append(re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line))
    plain = re.sub(r"\\[\\`*\[\]|]", "", "\n".join(outside))
    return re.findall(r"<[a-zA-Z/!][^>]*|\]\([^)]*pwn[^)]*\)|<http[^>]*>", plain)
