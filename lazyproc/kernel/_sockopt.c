/* SPDX-License-Identifier: GPL-2.0-only */
#define _GNU_SOURCE
#include "_core.h"

#include <errno.h>
#include <sys/socket.h>

/* getsockopt(2) for each of `options` (level, name). The value of the i-th is at `values` + i * LP_OPTION, its length, or
 * a negative errno, in `lengths`. A socket has some forty, and a busy server thousands of sockets. */
void lp_getsockopts(int fd, const int32_t (*options)[2], size_t count, uint8_t *values, int32_t *lengths)
{
	for (size_t i = 0; i < count; i++) {
		socklen_t length = LP_OPTION;
		int got = getsockopt(fd, options[i][0], options[i][1], values + i * LP_OPTION, &length);

		lengths[i] = got < 0 ? -errno : (int32_t)length;
	}
}
