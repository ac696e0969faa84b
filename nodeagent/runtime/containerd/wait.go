package containerd

import (
	"context"
	"fmt"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Pause implements runtime.Runtime. Pausing what is paused is no error.
func (r *Runtime) Pause(ctx context.Context, session string) error {
	return r.freeze(ctx, session, ctd.Paused, ctd.Task.Pause)
}

// Resume implements runtime.Runtime. Resuming what runs is no error.
func (r *Runtime) Resume(ctx context.Context, session string) error {
	return r.freeze(ctx, session, ctd.Running, ctd.Task.Resume)
}

func (r *Runtime) freeze(ctx context.Context, session string, want ctd.ProcessStatus, do func(ctd.Task, context.Context) error) error {
	ctx, cancel := context.WithTimeout(r.ns(ctx), callTimeout)
	defer cancel()
	unlock, err := r.locks.lock(ctx, session)
	if err != nil {
		return classify(err)
	}
	defer unlock()
	task, err := r.task(ctx, session)
	if err != nil {
		return classify(err)
	}
	st, err := task.Status(ctx)
	if err == nil && st.Status == want {
		return nil
	}
	if err == nil && st.Status == ctd.Stopped {
		return fmt.Errorf("%w: session %s has exited", runtime.ErrNotFound, session)
	}
	if err == nil {
		err = do(task, ctx)
	}
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	return classify(err)
}

// Wait implements runtime.Runtime. It goes on through a restart of containerd,
// for as long as ctx allows: the shim holds the process.
func (r *Runtime) Wait(ctx context.Context, session string) (runtime.Exit, error) {
	ctx = r.ns(ctx)
	backoff := 100 * time.Millisecond
	for {
		exit, err := r.wait(ctx, session)
		if err == nil || !errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return exit, classify(err)
		}
		t := time.NewTimer(backoff)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return runtime.Exit{}, ctx.Err()
		}
		backoff = min(2*backoff, 5*time.Second)
	}
}

func (r *Runtime) wait(ctx context.Context, session string) (runtime.Exit, error) {
	task, err := r.task(ctx, session)
	if err != nil {
		return runtime.Exit{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, err := task.Wait(ctx)
	if err == nil {
		// Wait's goroutine sends even after cancel, into a buffer.
		select {
		case st := <-ch:
			code, at, werr := st.Result()
			if werr == nil {
				return r.exit(session, int(code), at), nil
			}
			// A containerd that dies is told on the channel, as gRPC says it.
			err = errgrpc.ToNative(werr)
		case <-ctx.Done():
			return runtime.Exit{}, ctx.Err()
		}
	}
	switch {
	case ctx.Err() != nil: // told on the channel as well, in gRPC's words
		return runtime.Exit{}, ctx.Err()
	case errdefs.IsNotFound(err):
		return runtime.Exit{}, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	return runtime.Exit{}, err
}
