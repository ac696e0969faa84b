package worker

import (
	"context"
	"errors"
	"fmt"

	"github.com/docker/go-units"

	ckpt "github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// Reasons that a node gives. They are part of the API: never rename one.
const (
	ReasonOOMKilled          = "OOM_KILLED"
	ReasonExited             = "OPENCODE_EXITED"
	ReasonNotReady           = "OPENCODE_NOT_READY"
	ReasonUnresponsive       = "OPENCODE_UNRESPONSIVE"
	ReasonImageNotFound      = "IMAGE_NOT_FOUND"
	ReasonImagePull          = "IMAGE_PULL_FAILED"
	ReasonInvalidSpec        = "INVALID_SPEC"
	ReasonDiskFull           = "NODE_DISK_FULL"
	ReasonRuntimeUnavailable = "CONTAINERD_UNAVAILABLE"
	ReasonStartFailed        = "START_FAILED"
	ReasonDeleteFailed       = "DELETE_FAILED"
	ReasonWorkspaceMissing   = "WORKSPACE_MISSING"

	ReasonFenced             = "FENCED"
	ReasonStorageUnreachable = "STORAGE_UNREACHABLE"
	ReasonStorageDenied      = "STORAGE_DENIED"
	ReasonStorageNoBucket    = "STORAGE_NO_BUCKET"
	ReasonStorageRegion      = "STORAGE_WRONG_REGION"
	ReasonStorageUnsupported = "STORAGE_UNSUPPORTED"
	ReasonCheckpointDamaged  = "CHECKPOINT_DAMAGED"
	ReasonCheckpointMissing  = "CHECKPOINT_NOT_FOUND"
	ReasonCheckpointKey      = "WRONG_ENCRYPTION_KEY"
	ReasonNoMounter          = "NO_MOUNTER"
	ReasonMountFailed        = "MOUNT_FAILED"
	ReasonNotFlushed         = "NOT_FLUSHED"
	ReasonStorageNotAllowed  = "STORAGE_ENDPOINT_NOT_ALLOWED"
)

var (
	errNotReady    = errors.New("OpenCode did not answer")
	errNoWorkspace = errors.New("the session has run on this node, but its files are not here any more")
)

// exitError says that the container ended by itself.
type exitError struct {
	exit  runtime.Exit
	limit int64 // bytes of memory; 0 if there is none
}

func (e *exitError) Error() string {
	if !e.exit.OOMKilled {
		return fmt.Sprintf("OpenCode exited with code %d", e.exit.Code)
	}
	if e.limit == 0 {
		return "the container was killed because the node ran out of memory"
	}
	return fmt.Sprintf("the container was killed because it needed more memory than its limit of %s", units.BytesSize(float64(e.limit)))
}

// classify turns an error into a reason, what to do about it, and whether trying
// again cannot help until somebody has done that.
func classify(err error) (reason, advice string, permanent bool) {
	var exit *exitError
	switch {
	case errors.As(err, &exit) && exit.exit.OOMKilled:
		return ReasonOOMKilled, "raise the session's memory limit (cloudcode session update --memory)", false
	case errors.As(err, &exit):
		return ReasonExited, "cloudcode session logs shows why", false
	case errors.Is(err, errNoWorkspace):
		return ReasonWorkspaceMissing, "bring the node's old disk back, or delete the session", true
	case errors.Is(err, checkpoint.ErrFenced):
		return ReasonFenced, "nothing is to be done here", true
	case errors.Is(err, ckpt.ErrDamaged):
		return ReasonCheckpointDamaged, "an earlier checkpoint still restores (cloudcode session checkpoints, then session restore --at)", true
	case errors.Is(err, ckpt.ErrKey):
		return ReasonCheckpointKey, "give the server the encryption key that the bucket's checkpoints were made with", true
	case errors.Is(err, ckpt.ErrNotFound):
		return ReasonCheckpointMissing, "cloudcode session checkpoints lists those that are there", true
	case errors.Is(err, checkpoint.ErrNoMounter):
		return ReasonNoMounter, "install TigrisFS or rclone and fuse3 on the node, or place the session on another with a node selector", true
	case errors.Is(err, mount.ErrNotFlushed):
		return ReasonNotFlushed, "", false
	case errors.Is(err, objstore.ErrNotAllowed):
		return ReasonStorageNotAllowed, "the server's option --own-storage says which endpoints sessions may bring", true
	case errors.Is(err, mount.ErrInvalid):
		return ReasonMountFailed, "", true
	case errors.Is(err, mount.ErrFailed):
		return ReasonMountFailed, "", false
	case errors.Is(err, objstore.ErrUnavailable):
		return ReasonStorageUnreachable, "the session goes on when the object store answers", false
	case errors.Is(err, objstore.ErrDenied):
		return ReasonStorageDenied, "mend the keys of the storage profile or of the session", true
	case errors.Is(err, objstore.ErrNoBucket):
		return ReasonStorageNoBucket, "make the bucket, or bring it back", true
	case errors.Is(err, objstore.ErrRegion):
		return ReasonStorageRegion, "mend the region of the storage profile or of the session", true
	case errors.Is(err, objstore.ErrUnsupported):
		return ReasonStorageUnsupported, "", true
	case errors.Is(err, errNotReady):
		return ReasonNotReady, "cloudcode session logs shows why", false
	case errors.Is(err, runtime.ErrImageNotFound):
		return ReasonImageNotFound, "", true
	case errors.Is(err, runtime.ErrImagePull):
		return ReasonImagePull, "", false
	case errors.Is(err, runtime.ErrInvalidSpec):
		return ReasonInvalidSpec, "change the session's spec", true
	case errors.Is(err, runtime.ErrNoSpace):
		return ReasonDiskFull, "free space on the node", true
	case errors.Is(err, runtime.ErrUnavailable):
		return ReasonRuntimeUnavailable, "see the node daemon's log", false
	default:
		return ReasonStartFailed, "", false
	}
}

// failed reports an error of an attempt to bring the session to its assignment.
func (w *Worker) failed(a *nodev1.Assignment, err error, failures int) {
	wait := backoff(failures, err)
	w.log.Warn("session is not as assigned", "error", err, "failures", failures, "retry_in", wait)
	if a == nil {
		return
	}
	reason, advice, permanent := classify(err)
	message := err.Error()
	if errors.Is(err, context.DeadlineExceeded) && reason == ReasonStartFailed {
		message = "timed out: " + message
	}
	if advice != "" {
		message += "; " + advice
	}
	w.report(a, func(s *nodev1.SessionStatus) {
		s.State = nodev1.SessionStatus_STARTING
		if permanent || failures >= failedAfter {
			s.State = nodev1.SessionStatus_FAILED
		}
		switch a.GetDesiredState() {
		case nodev1.Assignment_DELETE:
			reason = ReasonDeleteFailed
			if a.GetStorage() != nil {
				message += "; to delete it without saving what changed last, delete it again with --purge, which deletes its storage, too"
			}
		case nodev1.Assignment_SUSPEND:
			s.State = nodev1.SessionStatus_SUSPENDING
		}
		s.Reason = reason
		s.Message = fmt.Sprintf("%s (try %d; next in %v)", message, failures, wait)
		s.ReadyTime = nil
	})
}
