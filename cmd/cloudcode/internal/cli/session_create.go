package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionCreateCmd() *cobra.Command {
	var spec specFlags
	var storage storageFlags
	var wait, noWait bool
	var timeout time.Duration
	var requestID string
	cmd := &cobra.Command{
		Use:   "create [ID]",
		Short: "Create a session",
		Long: `Create a session. Without an ID it gets a generated one; an ID is a DNS label of
at most 40 characters without "--", because it becomes a host name.

The command returns as soon as the server has stored the session, which then
starts; with --wait it shows how far that is, and returns when OpenCode answers.

Its files and chats are kept in the server's object storage, if it has one. A
profile, a folder or a bucket of its own can be named. The secret key of such a
bucket is read from a file or from $SESSION_S3_SECRET_ACCESS_KEY, never from an
argument. A folder that already holds a session's checkpoints is gone on with.`,
		Example: `  cloudcode session create main --wait
  cloudcode session create --cpu 2 --memory 4Gi --env OPENAI_API_KEY --label team=web
  cloudcode session create review --opencode-config opencode.json
  cloudcode session create mine --s3-endpoint https://s3.example.com --s3-bucket work \
    --s3-access-key-id AKID --s3-secret-access-key-file key.txt`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			session, err := spec.spec(cmd.InOrStdin())
			if err != nil {
				return err
			}
			if session.Spec.Storage, err = storage.storage(cmd); err != nil {
				return err
			}
			req := &cloudcodev1.CreateSessionRequest{Session: session, RequestId: requestID}
			if len(a) == 1 {
				name, err := sessionName(a[0])
				if err != nil {
					return err
				}
				req.SessionId = idOf(name)
			}
			if timeout <= 0 {
				return usagef("--timeout %s: want more than 0", timeout)
			}
			return withClient(cmd, func(c *client) error {
				s, err := c.createSession(cmd.Context(), req)
				if err != nil {
					return err
				}
				if !wait || noWait {
					return printCreated(cmd, s)
				}
				return c.waitAndPrint(cmd, s, timeout, starting{interrupted: "remove it with `cloudcode session delete " + idOf(s.GetName()) + "`"})
			})
		},
	}
	spec.register(cmd, "")
	storage.register(cmd)
	f := cmd.Flags()
	f.BoolVarP(&wait, "wait", "w", false, "show the start and return when the session is ready")
	f.BoolVar(&noWait, "no-wait", false, "return at once, whatever $CLOUDCODE_WAIT says (the default)")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "how long --wait waits")
	f.StringVar(&requestID, "request-id", "", "a `UUID`; repeating a create with the same one makes no second session (default: a new one)")
	SetEnvName(f, "no-wait", "")
	return cmd
}

// createSession creates, and tries again when the answer was lost: the request
// id makes that safe.
func (c *client) createSession(ctx context.Context, req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
	if req.RequestId == "" {
		req.RequestId = uuid.NewString()
	}
	return c.retry(ctx, func() (*cloudcodev1.Session, error) {
		ctx, cancel := c.request(ctx)
		defer cancel()
		return c.sessions.CreateSession(ctx, req)
	})
}

// retry makes a call that carries a request id again when its answer was lost.
func (c *client) retry(ctx context.Context, call func() (*cloudcodev1.Session, error)) (*cloudcodev1.Session, error) {
	pause := c.pace.minPause
	for attempt := 1; ; attempt++ {
		s, err := call()
		// A connection that was never there is said at once.
		if err == nil || attempt == 3 || status.Code(err) != codes.Unavailable || c.tls.last() != nil ||
			strings.Contains(err.Error(), "while dialing") {
			return s, err
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, err
		}
		pause = min(2*pause, c.pace.maxPause)
	}
}

// printCreated prints a session that is not waited for.
func printCreated(cmd *cobra.Command, s *cloudcodev1.Session) error {
	if o := outputOf(cmd); o != formatTable {
		return printSession(cmd, s)
	}
	id := idOf(s.GetName())
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), "session %s created\n", id); err != nil {
		return err
	}
	w := cmd.ErrOrStderr()
	fmt.Fprintf(w, "  see it:   cloudcode session get %s\n", id)
	fmt.Fprintf(w, "  open it:  cloudcode session open %s\n", id)
	return nil
}

// waitAndPrint waits until s is ready, showing how it starts.
func (c *client) waitAndPrint(cmd *cobra.Command, s *cloudcodev1.Session, timeout time.Duration, how starting) error {
	view := waitView(cmd)
	s, err := c.waitReady(cmd.Context(), s, timeout, view, how)
	if err != nil {
		view.finish(false)
		return err
	}
	if outputOf(cmd) != formatTable {
		return printSession(cmd, s)
	}
	return printReady(cmd.OutOrStdout(), s)
}

// waitView shows a wait where that disturbs no program.
func waitView(cmd *cobra.Command) *startView {
	if outputOf(cmd) == formatTable || screenOf(cmd.ErrOrStderr()) != nil {
		return newStartView(cmd.ErrOrStderr(), now)
	}
	return newStartView(io.Discard, now)
}

// starting says what start is waited for.
type starting struct {
	// From this generation on: an older one still runs for a moment.
	generation int64
	// The session is being woken: that it does not run yet is no failure.
	waking bool
	// What to do after Ctrl-C.
	interrupted string
}

func printReady(w io.Writer, s *cloudcodev1.Session) error {
	if _, err := fmt.Fprintf(w, "session %s is ready\n", idOf(s.GetName())); err != nil {
		return err
	}
	if s.GetWebUri() == "" {
		return nil
	}
	return printFields(w, []field{{"  web", s.GetWebUri()}, {"  attach", attachLine(s)}})
}

// attachLine is a command line that joins the session from a terminal. The
// password is left to the shell: it must not end up in a history or a log.
func attachLine(s *cloudcodev1.Session) string {
	line := "opencode attach " + attachURI(s)
	if os.Getenv("SERVER_PASSWORD") != "" {
		if os.Getenv("SERVER_USERNAME") != "" {
			line += ` -u "$SERVER_USERNAME"`
		}
		line += ` -p "$SERVER_PASSWORD"`
	}
	return line
}

// attachURI is where terminals reach the session. Browsers resolve names below
// localhost by themselves; a plain Debian does not, so there it is the path.
func attachURI(s *cloudcodev1.Session) string {
	u, err := url.Parse(s.GetWebUri())
	if err != nil || !strings.HasSuffix(u.Hostname(), ".localhost") {
		return s.GetWebUri()
	}
	id := idOf(s.GetName())
	u.Host = strings.TrimPrefix(u.Host, id+".")
	u.Path = "/v1/sessions/" + id + "/proxy"
	return u.String()
}

// waitReady returns the session once it is RUNNING, or why it will not be.
func (c *client) waitReady(ctx context.Context, s *cloudcodev1.Session, timeout time.Duration, view *startView, how starting) (*cloudcodev1.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last, id, asleep := s, idOf(s.GetName()), how.waking
	tick := view.tick
	if view.scr == nil {
		tick = nil
	}
	err := c.observe(ctx, s, func(s *cloudcodev1.Session) (bool, error) {
		if s == nil {
			return false, &Error{Code: "NOT_FOUND", Reason: "DELETED", Msg: "session " + id + " was deleted while it started", Exit: exitFailed}
		}
		last = s
		if s.GetGeneration() < how.generation && s.GetState() != cloudcodev1.Session_DELETING {
			return false, nil
		}
		view.show(s)
		switch s.GetState() {
		case cloudcodev1.Session_RUNNING:
			return true, nil
		case cloudcodev1.Session_DELETING:
			return false, startFailed(s)
		case cloudcodev1.Session_FAILED, cloudcodev1.Session_LOST, cloudcodev1.Session_SUSPENDING, cloudcodev1.Session_SUSPENDED:
			if !asleep {
				return false, startFailed(s)
			}
		default:
			asleep = false
		}
		return false, nil
	}, tick)
	if errors.Is(err, context.DeadlineExceeded) {
		return last, timedOut(last, "is not ready after "+timeout.String(),
			"it goes on starting; look again with `cloudcode session get "+id+"`, or see `cloudcode session logs "+id+"`")
	}
	if errors.Is(err, context.Canceled) {
		return last, &Error{
			Code: "CANCELLED", Msg: "interrupted; session " + id + " goes on starting", Exit: exitInterrupted, Err: err,
			Hint: how.interrupted,
		}
	}
	return last, err
}

// startFailed says why a session that was waited for is not ready.
func startFailed(s *cloudcodev1.Session) error {
	id := idOf(s.GetName())
	e := &Error{Code: "FAILED", Reason: s.GetReason(), Exit: exitFailed, Msg: "session " + id + " is " + s.GetState().String()}
	if w := why(s); w != "" {
		e.Msg += ": " + w
	}
	e.Hint = reasonHints[s.GetReason()]
	switch {
	case e.Hint != "":
	case s.GetState() == cloudcodev1.Session_SUSPENDED || s.GetState() == cloudcodev1.Session_SUSPENDING:
		e.Hint = "start it with `cloudcode session resume " + id + "`"
	case s.GetNode() != "":
		e.Hint = "see `cloudcode session logs " + id + "`"
	}
	return e
}
