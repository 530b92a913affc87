# From the loader's 32-bit mode to 64 bits, with the first GiB mapped as it is, and SSE and XSAVE switched on; then kmain.
.set MAGIC, 0x1BADB002
.section .multiboot, "a"
.align 4
.long MAGIC, 0, -MAGIC

.section .text
.code32
.globl _start
_start:
  cli
  mov $stack_top, %esp
  mov $page_directory_pointers, %eax; or $3, %eax; mov %eax, page_map
  mov $page_directory, %eax; or $3, %eax; mov %eax, page_directory_pointers
  xor %ecx, %ecx
1:mov %ecx, %eax; shl $21, %eax; or $0x83, %eax; mov %eax, page_directory(, %ecx, 8)  # 2 MiB a page
  inc %ecx; cmp $512, %ecx; jne 1b
  mov $page_map, %eax; mov %eax, %cr3
  mov %cr4, %eax; or $(1 << 5 | 1 << 9 | 1 << 10 | 1 << 18), %eax; mov %eax, %cr4  # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
  mov $0xC0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr                            # long mode
  mov %cr0, %eax; and $~4, %eax; or $0x80000003, %eax; mov %eax, %cr0
  lgdt descriptors_size
  ljmp $8, $long_mode
.code64
long_mode:
  mov $16, %ax; mov %ax, %ds; mov %ax, %es; mov %ax, %ss
  mov $stack_top, %rsp
  fninit
  call kmain
2:hlt; jmp 2b
.align 16
descriptors: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
descriptors_size: .word 23; .long descriptors

.bss
.align 4096
page_map: .skip 4096
page_directory_pointers: .skip 4096
page_directory: .skip 4096
.skip 262144
stack_top:
.section .note.GNU-stack, "", @progbits
