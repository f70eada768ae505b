/* The texts that are compiled in, as the files in the source tree have them. See embed.h. */
        .section .rodata
        .global embed_invoice_schema, embed_prompt, embed_setup_sqlite, embed_setup_database
embed_invoice_schema:
        .incbin "fcgi-app/invoice.schema.json"
        .byte 0
embed_prompt:
        .incbin "fcgi-app/prompt.txt"
        .byte 0
embed_setup_sqlite:
        .incbin "sql/setup_sqlite.sql"
        .byte 0
embed_setup_database:
        .incbin "sql/setup_database.sql"
        .byte 0
        .section .note.GNU-stack,"",%progbits
