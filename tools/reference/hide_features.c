/* Makes a program see a lesser CPU: what CPUID says of AVX-512, AMX and VNNI is hidden from it, so that the levels below this CPU's
 * are tested and measured as whole programs, and peers are held to the same. x86-64 Linux on CPUs with CPUID faulting.
 *
 *     cc -O2 -shared -fPIC -o hide_features.so tools/reference/hide_features.c
 *     HIDE=avx512,amx,vnni LD_PRELOAD=./hide_features.so PROGRAM
 *
 * The instruction CPUID is made to fault (arch_prctl(2), ARCH_SET_CPUID), and answered with the bits of HIDE cleared. Nothing else
 * changes: code that does not ask still runs.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif

#define BIT(n) (1u << (n))

/* Bits of leaf 7 by subleaf and register (Intel's manual, volume 2, CPUID). */
struct feature {
    const char *name;
    unsigned ebx0, ecx0, edx0, eax1, edx1;
};

static const struct feature FEATURES[] = {
    {"avx512",
     BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31), /* F DQ IFMA PF ER CD BW VL */
     BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14),                                 /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
     BIT(2) | BIT(3) | BIT(8) | BIT(23),                                            /* 4VNNIW 4FMAPS VP2INTERSECT FP16 */
     BIT(5), 0},                                                                    /* BF16 */
    {"amx", 0, 0, BIT(22) | BIT(24) | BIT(25), BIT(21), 0},                         /* BF16 TILE INT8, FP16 */
    {"vnni", 0, BIT(11), 0, BIT(4), BIT(4) | BIT(5) | BIT(10)},                     /* AVX-VNNI, its INT8 and INT16 */
};

static struct feature hidden;

/* errno belongs to whoever is interrupted. */
static long set_cpuid(unsigned long allowed) {
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(SYS_arch_prctl), "D"(ARCH_SET_CPUID), "S"(allowed)
                     : "rcx", "r11", "memory");
    return result;
}

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) {
        /* A fault of the program's own comes again, and ends it. */
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
    unsigned eax = leaf, ebx, ecx = subleaf, edx;
    set_cpuid(1);
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    set_cpuid(0);
    if (leaf == 7 && subleaf == 0) {
        ebx &= ~hidden.ebx0;
        ecx &= ~hidden.ecx0;
        edx &= ~hidden.edx0;
    } else if (leaf == 7 && subleaf == 1) {
        eax &= ~hidden.eax1;
        edx &= ~hidden.edx1;
    }
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
    const char *names = getenv("HIDE");
    if (!names)
        return;
    for (size_t i = 0; i < sizeof FEATURES / sizeof *FEATURES; i++) {
        if (strstr(names, FEATURES[i].name)) {
            hidden.ebx0 |= FEATURES[i].ebx0;
            hidden.ecx0 |= FEATURES[i].ecx0;
            hidden.edx0 |= FEATURES[i].edx0;
            hidden.eax1 |= FEATURES[i].eax1;
            hidden.edx1 |= FEATURES[i].edx1;
        }
    }
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    if (sigaction(SIGSEGV, &action, NULL) || set_cpuid(0)) {
        fprintf(stderr, "hide_features: this CPU or kernel has no CPUID faulting\n");
        exit(1);
    }
}
