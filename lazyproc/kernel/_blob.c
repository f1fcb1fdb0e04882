/* SPDX-License-Identifier: GPL-2.0-only */
/* The code that runs inside tracees. It is copied there as bytes: position independent, no data, no stack. */
#include "_core.h"

__asm__(
	".pushsection .rodata\n"
	".globl lp_begin_, lp_loop_, lp_syscall_, lp_ended_, lp_nursery_, lp_reap_, lp_end_\n"
	".p2align 4\n"
	"lp_begin_:\n"
	/* r12: rows of 64 bytes, r13: their number (> 0), r14: the way home, r15: signal */
	"lp_loop_:\n"
	"	movl (%r12), %eax\n"
	"	movq 8(%r12), %rdi\n"
	"	movq 16(%r12), %rsi\n"
	"	movq 24(%r12), %rdx\n"
	"	movq 32(%r12), %r10\n"
	"	movq 40(%r12), %r8\n"
	"	movq 48(%r12), %r9\n"
	"	testl $2, 4(%r12)\n" /* the row is an xrstor */
	"	jnz 6f\n"
	"lp_syscall_:\n"
	"	syscall\n"
	"7:	movq %rax, 56(%r12)\n"
	"	cmpq $-4095, %rax\n"
	"	jae 2f\n"
	"1:	addq $64, %r12\n"
	"	decq %r13\n"
	"	jnz lp_loop_\n"
	"	jmp 3f\n"
	"2:	testl $1, 4(%r12)\n" /* the row may fail */
	"	jnz 1b\n"
	/* The dead man's handle. Traced, the signal is a stop; without a tracer it is ignored, and the thread
	 * goes home by itself: it has its own stack pointer all the time, the rest is loaded there. */
	"3:	movl $39, %eax\n" /* getpid */
	"	syscall\n"
	"	movl %eax, %ebx\n"
	"	movl $186, %eax\n" /* gettid */
	"	syscall\n"
	"	movl %ebx, %edi\n"
	"	movl %eax, %esi\n"
	"	movl %r15d, %edx\n"
	"	movl $234, %eax\n" /* tgkill */
	"	syscall\n"
	"lp_ended_:\n"
	"	jmpq *%r14\n"
	"6:	movl %esi, %eax\n"
	"	xrstor64 (%rdi)\n"
	"	xorl %eax, %eax\n"
	"	jmp 7b\n"
	".p2align 4\n"
	"lp_nursery_:\n"
	"	movl $34, %eax\n" /* pause */
	"	syscall\n"
	"	jmp lp_nursery_\n"
	".p2align 4\n"
	/* r12: the root's pid as seen here; r13: its wait status, 0 at first */
	"lp_reap_:\n"
	"	movq $-1, %rdi\n"
	"	leaq -16(%rsp), %rsi\n"
	"	movl $0x40000000, %edx\n" /* __WALL */
	"	xorl %r10d, %r10d\n"
	"	movl $61, %eax\n" /* wait4 */
	"	syscall\n"
	"	cmpq $-10, %rax\n" /* ECHILD */
	"	je 4f\n"
	"	cmpq %r12, %rax\n"
	"	jne lp_reap_\n"
	"	movl -16(%rsp), %r13d\n"
	"	jmp lp_reap_\n"
	"4:	movl %r13d, %edi\n"
	"	shrl $8, %edi\n"
	"	andl $0xff, %edi\n"
	"	andl $0x7f, %r13d\n"
	"	jz 5f\n"
	"	leal 128(%r13), %edi\n" /* as a shell reports a death by signal */
	"5:	movl $231, %eax\n" /* exit_group */
	"	syscall\n"
	"	ud2\n"
	"lp_end_:\n"
	".popsection\n");

extern const uint8_t lp_begin_[], lp_loop_[], lp_syscall_[], lp_ended_[], lp_nursery_[], lp_reap_[], lp_end_[];

const uint8_t *lp_blob(size_t *size)
{
	*size = (size_t)(lp_end_ - lp_begin_);
	return lp_begin_;
}

size_t lp_blob_loop(void) { return (size_t)(lp_loop_ - lp_begin_); }
size_t lp_blob_syscall(void) { return (size_t)(lp_syscall_ - lp_begin_); }
size_t lp_blob_ended(void) { return (size_t)(lp_ended_ - lp_begin_); }
size_t lp_blob_nursery(void) { return (size_t)(lp_nursery_ - lp_begin_); }
size_t lp_blob_reap(void) { return (size_t)(lp_reap_ - lp_begin_); }
