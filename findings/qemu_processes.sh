#!/usr/bin/env bash
# Under user-mode QEMU one process is emulated, not a machine. What an aarch64 program starts is handed to the host's
# kernel as it is (execve in linux-user/syscall.c): the host's x86-64 /bin/sh runs natively and says so, and the program
# cannot start itself again unless the host has registered QEMU for such files (binfmt_misc).
# It hurts test suites under emulation that start compilers, workers or themselves: some of it was not emulated at all.
set -euo pipefail
for tool in aarch64-linux-gnu-gcc qemu-aarch64-static; do
  command -v "$tool" > /dev/null || { echo "needs $tool (Debian: gcc-aarch64-linux-gnu qemu-user-static)" >&2; exit 2; }
done
[[ $(uname -m) == x86_64 ]] || { echo "needs x86-64" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/program.c" <<'C'
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int count, char** arguments) {
  struct utsname name;
  uname(&name);
  printf("%s\n", name.machine);
  fflush(stdout);
  if (count > 1) return 0;
  if (system("uname -m") != 0) puts("system() failed");
  if (fork() == 0) {
    execl(arguments[0], arguments[0], "again", (char*)0);
    puts(strerror(errno));
    exit(0);
  }
  wait(0);
  return 0;
}
C
aarch64-linux-gnu-gcc -O1 -static "$tmp/program.c" -o "$tmp/program"
qemu-aarch64-static --version | head -1
found=$(qemu-aarch64-static "$tmp/program" | xargs)
echo "expected: the program, its shell and its second self all say aarch64"
echo "found: $found"
case $found in
  "aarch64 x86_64 Exec format error") echo "as recorded: the shell is the host's, and the program cannot start itself" ;;
  "aarch64 x86_64 aarch64") echo "as recorded: the shell is the host's; QEMU is registered for aarch64 programs here" ;;
  *) echo "CHANGED" >&2; exit 1 ;;
esac
