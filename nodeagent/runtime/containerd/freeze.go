package containerd

import (
	"context"
	"errors"
	"fmt"

	"github.com/cloudcode-dev/cloudcode/nodeagent/freezer"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

var _ runtime.Freezer = (*Runtime)(nil)

// Freeze implements runtime.Freezer. It does not go through the shim, which takes
// 15 ms each way; containerd finds the truth in the cgroup when it is asked.
func (r *Runtime) Freeze(ctx context.Context, session string) (thaw func() error, err error) {
	task, err := r.task(r.ns(ctx), session)
	if err != nil {
		return nil, err
	}
	thaw, err = freezer.Freeze(ctx, int(task.Pid()))
	if errors.Is(err, freezer.ErrGone) {
		return nil, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	return thaw, err
}
