/* embed.h - the texts that are compiled in (embed.S): each is followed by a NUL byte. */
#ifndef EXTRACT_EMBED_H
#define EXTRACT_EMBED_H

extern const char embed_invoice_schema[]; /* fcgi-app/invoice.schema.json */
extern const char embed_prompt[];         /* fcgi-app/prompt.txt */
extern const char embed_setup_sqlite[];   /* sql/setup_sqlite.sql */
extern const char embed_setup_database[]; /* sql/setup_database.sql: for SQL Server */

#endif
