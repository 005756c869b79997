"""The dialects: request in, events out, errors in their own envelopes.

chat.py, openai.py              OpenAI's chat and text completions, passed on
response*.py                    OpenAI's Responses
messages.py, message_*.py,
anthropic.py                    Anthropic's Messages
chat_request.py, chat_events.py,
call_order.py                   what the translated ones have in common
"""
