"""What a browser shows when its user gives up typing the key: a sentence in both languages, and a way to try again."""

KEY_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>MiniGPT-4</title>
<meta name="color-scheme" content="light dark">
<style>
body { font: 1.125rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1.5rem; }
</style>
<p>This server wants a key, and there was none or a wrong one.
<p><a href="">Type it again</a>: leave the user name empty and give the key as the password.
<p lang="zh-CN">此服务器需要密钥，而密钥缺失或不正确。<a href="">重新输入</a>：用户名留空，密码处填写密钥。
</html>
"""  # noqa: RUF001  (Chinese punctuation)

KEY_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
