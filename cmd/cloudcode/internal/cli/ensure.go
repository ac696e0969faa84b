package cli

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// ErrNoSession: the session could not be created because of its object storage, and
// why was said.
var ErrNoSession = errors.New("the session was not created")

// EnsureSession creates a session on the server of this machine unless there is
// one of that id, and shows how it starts. How the start ends is shown, too, and
// is no error: the session is tried again by itself. Returns ErrNoSession.
func EnsureSession(cmd *cobra.Command, id string, timeout time.Duration) error {
	return withClient(cmd, func(c *client) error {
		name, err := sessionName(id)
		if err != nil {
			return err
		}
		ctx := cmd.Context()
		rctx, cancel := c.request(ctx)
		s, err := c.sessions.GetSession(rctx, &cloudcodev1.GetSessionRequest{Name: name})
		cancel()
		if status.Code(err) == codes.NotFound {
			s, err = c.createSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: id, Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{}}})
		}
		if err != nil && strings.HasPrefix(grpcerr.Reason(err), "STORAGE_") {
			// The server runs all the same: what helps is often to be done with it.
			fmt.Fprintf(cmd.ErrOrStderr(), "session %s: not created: %v\n", id, c.explain(err))
			return ErrNoSession
		}
		if err != nil {
			return err
		}
		view := newStartView(cmd.OutOrStdout(), now)
		if _, err := c.waitReady(ctx, s, timeout, view, starting{}); err != nil && ctx.Err() == nil {
			view.finish(false)
			fmt.Fprintf(cmd.ErrOrStderr(), "session %s: %v\n", id, c.explain(err))
		}
		return ctx.Err()
	})
}
