; The part of the threads that runs without Python, and so without its lock; see
; cpu_threads.py, which fills in PAUSE and FUTEX.
;
; A job is a number of tasks. Whoever works on it draws numbers from a counter, until
; all are given out. A slot is one helper thread's letter box; its state is
;   0  the helper waits for a job
;   1  a job lies there
;   2  the helper works on it
;   3  a caller is about to put a job there

;                task, next number, number of tasks, scratch memory, its bytes a thread
%job = type    { ptr,  i64,         i64,             ptr,            i64 }
;                state, job, scratch memory; 64 bytes, so that no two share a cache line
%slot = type   { i64,   ptr, ptr, [5 x i64] }

PAUSE_DECLARATION
declare i64 @syscall(i64, ...)

; Waits until the state is not `value`, or without a reason.
define internal void @sleep(ptr %state, i32 %value) {
  ; 128: FUTEX_WAIT_PRIVATE
  %1 = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %state, i64 128, i32 %value, ptr null, ptr null, i64 0)
  ret void
}

define internal void @wake(ptr %state) {
  ; 129: FUTEX_WAKE_PRIVATE
  %1 = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %state, i64 129, i64 2147483647, ptr null, ptr null, i64 0)
  ret void
}

; Waits awake until the state is `value` (%equal) or is not, for so many rounds at most.
; Returns the state.
define internal i32 @watch(ptr %state, i32 %value, i1 %equal, i64 %rounds) {
entry:
  br label %spin
spin:
  %round = phi i64 [ 0, %entry ], [ %next, %pause ]
  %now = load atomic i32, ptr %state acquire, align 8
  %same = icmp eq i32 %now, %value
  %done = icmp eq i1 %same, %equal
  br i1 %done, label %end, label %go_on
go_on:
  %next = add i64 %round, 1
  %tired = icmp sgt i64 %next, %rounds
  br i1 %tired, label %end, label %pause
pause:
  PAUSE
  br label %spin
end:
  ret i32 %now
}

; Waits until the state is `value` (%equal) or is not: awake for `spins` rounds, then
; asleep. A state that changes is always woken.
define internal void @await(ptr %state, i32 %value, i1 %equal, i64 %spins) {
entry:
  br label %awake
awake:
  %now = call i32 @watch(ptr %state, i32 %value, i1 %equal, i64 %spins)
  %same = icmp eq i32 %now, %value
  %done = icmp eq i1 %same, %equal
  br i1 %done, label %end, label %asleep
asleep:
  call void @sleep(ptr %state, i32 %now)
  br label %awake
end:
  ret void
}

; Takes as long as so many rounds of `await` without a change.
define void @rest(i64 %rounds) {
  %state = alloca i32, align 8
  store i32 0, ptr %state
  %now = call i32 @watch(ptr %state, i32 1, i1 true, i64 %rounds)
  ret void
}

; Runs tasks of the job until none is left.
define internal void @work(ptr %job, ptr %scratch) {
entry:
  ; Numba's functions return a status, and through two pointers a result and an error.
  %result = alloca ptr
  %error = alloca ptr
  %task = load ptr, ptr %job
  %next = getelementptr %job, ptr %job, i32 0, i32 1
  %count.at = getelementptr %job, ptr %job, i32 0, i32 2
  %count = load i64, ptr %count.at
  br label %draw
draw:
  %number = atomicrmw add ptr %next, i64 1 monotonic
  %more = icmp slt i64 %number, %count
  br i1 %more, label %run, label %done
run:
  %status = call i32 %task(ptr %result, ptr %error, ptr %job, i64 %number, ptr %scratch)
  br label %draw
done:
  ret void
}

; The life of a helper thread.
define void @help(ptr %slot, i64 %spins) {
entry:
  %job.at = getelementptr %slot, ptr %slot, i32 0, i32 1
  %scratch.at = getelementptr %slot, ptr %slot, i32 0, i32 2
  br label %wait
wait:
  call void @await(ptr %slot, i32 1, i1 true, i64 %spins)
  %taken = cmpxchg ptr %slot, i32 1, i32 2 acquire monotonic
  %mine = extractvalue { i32, i1 } %taken, 1
  br i1 %mine, label %run, label %wait
run:
  %job = load ptr, ptr %job.at
  %scratch = load ptr, ptr %scratch.at
  call void @work(ptr %job, ptr %scratch)
  store atomic i32 0, ptr %slot release, align 8
  call void @wake(ptr %slot)
  br label %wait
}

; Runs a job in this thread and in the helpers of the slots that have nothing to do.
define void @run(ptr %job, ptr %slots, i64 %count, i64 %spins) {
entry:
  %claimed = alloca i8, i64 %count
  %scratch.at = getelementptr %job, ptr %job, i32 0, i32 3
  %scratch = load ptr, ptr %scratch.at
  %bytes.at = getelementptr %job, ptr %job, i32 0, i32 4
  %bytes = load i64, ptr %bytes.at
  br label %claim
claim:
  %i = phi i64 [ 0, %entry ], [ %i.next, %claimed.no ], [ %i.next, %give ]
  %left = icmp slt i64 %i, %count
  br i1 %left, label %try, label %own
try:
  %i.next = add i64 %i, 1
  %slot = getelementptr %slot, ptr %slots, i64 %i
  %flag = getelementptr i8, ptr %claimed, i64 %i
  %taken = cmpxchg ptr %slot, i32 0, i32 3 acquire monotonic
  %free = extractvalue { i32, i1 } %taken, 1
  %free.byte = zext i1 %free to i8
  store i8 %free.byte, ptr %flag
  br i1 %free, label %give, label %claimed.no
claimed.no:
  br label %claim
give:
  ; The first part of the scratch memory is the caller's.
  %job.at = getelementptr %slot, ptr %slot, i32 0, i32 1
  %its.scratch.at = getelementptr %slot, ptr %slot, i32 0, i32 2
  %offset = mul i64 %i.next, %bytes
  %its.scratch = getelementptr i8, ptr %scratch, i64 %offset
  store ptr %job, ptr %job.at
  store ptr %its.scratch, ptr %its.scratch.at
  store atomic i32 1, ptr %slot release, align 8
  call void @wake(ptr %slot)
  br label %claim
own:
  call void @work(ptr %job, ptr %scratch)
  br label %collect
collect:
  %k = phi i64 [ 0, %own ], [ %k.next, %free.again ]
  %k.left = icmp slt i64 %k, %count
  br i1 %k.left, label %check, label %end
check:
  %k.next = add i64 %k, 1
  %k.slot = getelementptr %slot, ptr %slots, i64 %k
  %k.flag = getelementptr i8, ptr %claimed, i64 %k
  %k.byte = load i8, ptr %k.flag
  %k.mine = icmp ne i8 %k.byte, 0
  br i1 %k.mine, label %take.back, label %free.again
take.back:
  ; A helper that has not begun would find nothing to do.
  %back = cmpxchg ptr %k.slot, i32 1, i32 0 acquire monotonic
  %was.idle = extractvalue { i32, i1 } %back, 1
  br i1 %was.idle, label %free.again, label %finish
finish:
  ; While the helper works on this job, the state is 2, and nobody else changes it.
  call void @await(ptr %k.slot, i32 2, i1 false, i64 %spins)
  br label %free.again
free.again:
  br label %collect
end:
  ret void
}

; Says that a block of memory is free again: the `deleter` of DLPack's managed tensors.
define void @release(ptr %managed) {
  %flag.at = getelementptr i8, ptr %managed, i64 48
  %flag = load ptr, ptr %flag.at
  store atomic i64 0, ptr %flag release, align 8
  ret void
}
