/* extract.h - POST /extract. */
#ifndef EXTRACT_EXTRACT_H
#define EXTRACT_EXTRACT_H

#include "app.h"
#include "request.h"

void extract_handle(struct worker *worker, struct request *request, struct response *response);

#endif
