/* A program that touches memory when it is told to, one order a line. As a guest's first process it talks on the first
 * serial port, else on standard input and output.
 *
 *   fill MIB         maps MIB MiB anew and fills them with what compresses about 2:1       PRESTAGE filled bytes=N
 *   order SEED       next, every page once; seed 0 in ascending order, others shuffle it   PRESTAGE ordered pages=N
 *   part FIRST N SEED   the same of N pages from page FIRST on                              PRESTAGE ordered pages=N
 *   random N SEED    next, N pages drawn at random, with repetition                        PRESTAGE ordered pages=N
 *   touch [NS]       reads a byte of each page in that order, computing NS nanoseconds     PRESTAGE touched pages=N ns=N sum=N
 *                    after each
 *   end              ends; a guest powers off                                              PRESTAGE end
 *
 * At its start it says PRESTAGE alive, and PRESTAGE failed WHY when it cannot go on. `sum` depends on what was read and on
 * the order.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

#define PAGE 4096

static void leave(int status) {
  fflush(stdout);
  if (getpid() == 1) {
    tcdrain(1);
    reboot(RB_POWER_OFF);
  }
  _exit(status);
}

static void fail(const char *why) {
  printf("PRESTAGE failed %s\n", why);
  leave(1);
}

static uint64_t now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t draw(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static void compute(uint64_t ns) {
  if (ns == 0) return;
  for (uint64_t until = now() + ns; now() < until;) {}
}

static unsigned char *memory;
static uint64_t pages;
/* The next touch: up to as many pages as a gigabyte has. */
static uint32_t order[1 << 18];
static uint64_t ordered;

static void fill(uint64_t mib) {
  if (mib == 0 || mib * 256 > sizeof order / sizeof *order) fail("fill: 1 to 1024 MiB");
  if (memory != NULL) munmap(memory, pages * PAGE);
  pages = mib * 256;
  memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("fill: no memory");
  uint64_t state = mib;
  for (uint64_t page = 0; page < pages; page++) {
    uint64_t *words = (uint64_t *)(memory + page * PAGE);
    /* half noise, half one word: about 2:1 for any compressor */
    for (int i = 0; i < PAGE / 16; i++) words[i] = draw(&state);
    for (int i = PAGE / 16; i < PAGE / 8; i++) words[i] = page;
  }
  ordered = 0;
  printf("PRESTAGE filled bytes=%llu\n", (unsigned long long)(pages * PAGE));
}

/* Fisher and Yates. */
static void shuffle(uint64_t first, uint64_t count, uint64_t seed) {
  if (count > pages || first > pages - count) fail("part: more than is filled");
  for (uint64_t i = 0; i < count; i++) order[i] = (uint32_t)(first + i);
  uint64_t state = seed;
  for (uint64_t i = count; seed != 0 && i > 1; i--) {
    uint64_t j = draw(&state) % i;
    uint32_t swapped = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swapped;
  }
  ordered = count;
}

static void scatter(uint64_t count, uint64_t seed) {
  if (count > sizeof order / sizeof *order) fail("random: at most 262144 pages");
  uint64_t state = seed;
  for (uint64_t i = 0; i < count; i++) order[i] = (uint32_t)(draw(&state) % pages);
  ordered = count;
}

static void touch(uint64_t ns) {
  uint64_t sum = 0, start = now();
  for (uint64_t i = 0; i < ordered; i++) {
    sum = sum * 31 + *(volatile unsigned char *)(memory + (uint64_t)order[i] * PAGE);
    compute(ns);
  }
  uint64_t took = now() - start;
  printf("PRESTAGE touched pages=%llu ns=%llu sum=%llu\n", (unsigned long long)ordered, (unsigned long long)took,
         (unsigned long long)sum);
}

int main(void) {
  if (getpid() == 1) {
    /* the kernel has opened no console: there was no /dev */
    mkdir("/dev", 0755);
    if (mount("dev", "/dev", "devtmpfs", 0, NULL) != 0) reboot(RB_POWER_OFF);
    int port = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (port < 0) reboot(RB_POWER_OFF);
    struct termios raw;
    if (tcgetattr(port, &raw) == 0) {
      cfmakeraw(&raw);
      tcsetattr(port, TCSANOW, &raw);
    }
    for (int fd = 0; fd < 3; fd++) dup2(port, fd);
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  printf("PRESTAGE alive\n");
  char line[128];
  while (fgets(line, sizeof line, stdin) != NULL) {
    char verb[16] = "";
    unsigned long long a = 0, b = 0, c = 0;
    int words = sscanf(line, "%15s %llu %llu %llu", verb, &a, &b, &c);
    if (strcmp(verb, "fill") == 0 && words == 2) {
      fill(a);
    } else if (strcmp(verb, "order") == 0 && words == 2 && memory != NULL) {
      shuffle(0, pages, a);
      printf("PRESTAGE ordered pages=%llu\n", (unsigned long long)ordered);
    } else if (strcmp(verb, "part") == 0 && words == 4 && memory != NULL) {
      shuffle(a, b, c);
      printf("PRESTAGE ordered pages=%llu\n", (unsigned long long)ordered);
    } else if (strcmp(verb, "random") == 0 && words == 3 && memory != NULL) {
      scatter(a, b);
      printf("PRESTAGE ordered pages=%llu\n", (unsigned long long)ordered);
    } else if (strcmp(verb, "touch") == 0 && words >= 1 && ordered != 0) {
      touch(a);
    } else if (strcmp(verb, "end") == 0) {
      printf("PRESTAGE end\n");
      leave(0);
    } else if (words > 0) {
      fail("an order it does not know, or nothing is filled");
    }
  }
  leave(0);
}
