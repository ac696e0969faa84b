package cli

import (
	"errors"
	"fmt"
	"maps"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionUpdateCmd() *cobra.Command {
	var spec specFlags
	var keys keyFlags
	cmd := &cobra.Command{
		Use:   "update ID",
		Short: "Change labels, limits, environment or image of a session",
		Long: `Change a session. Labels and CPU, memory and process limits change while it runs.
Any other change restarts its container; workspace and chats stay. Where a session is
kept cannot be changed, but new keys can be given for a bucket of its own.

Labels and variables that are not named stay as they are; NAME- removes one.`,
		Example: `  cloudcode session update main --memory 4Gi --label team=web --label old-
  cloudcode session update main --env OPENAI_API_KEY`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			keyChange, keyPaths, err := keys.change(cmd.InOrStdin())
			if err != nil {
				return err
			}
			specChange, paths, err := spec.change(cmd, len(keyPaths) > 0)
			if err != nil {
				return err
			}
			paths = append(paths, keyPaths...)
			change := func(s *cloudcodev1.Session) { specChange(s); keyChange(s) }
			return withClient(cmd, func(c *client) error {
				if len(keyPaths) > 0 {
					s, err := c.getSession(cmd.Context(), a[0])
					if err != nil {
						return err
					}
					if s.GetSpec().GetStorage().GetS3() == nil {
						return usagef("session %s has no bucket of its own: its keys are the server's", idOf(s.GetName()))
					}
				}
				s, err := c.updateSession(cmd, a[0], change, paths)
				if err != nil {
					return err
				}
				if outputOf(cmd) != formatTable {
					return printSession(cmd, s)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "session %s updated\n", idOf(s.GetName()))
				return err
			})
		},
	}
	spec.register(cmd, ", NAME- removes it")
	keys.register(cmd)
	return cmd
}

// change returns what the flags do to a session, and the paths that changes. With
// more, there may be none: other flags change something.
func (s *specFlags) change(cmd *cobra.Command, more bool) (func(*cloudcodev1.Session), []string, error) {
	env, noEnv, errEnv := s.environment(true)
	labels, noLabels, errLabels := keyValues("label", s.labels, true)
	selector, noSelector, errSelector := keyValues("node-selector", s.selector, true)
	if err := errors.Join(errEnv, errLabels, errSelector); err != nil {
		return nil, nil, err
	}
	given := cmd.Flags().Changed
	config := ""
	if s.config != "" {
		var err error
		if config, err = readConfig(s.config, cmd.InOrStdin()); err != nil {
			return nil, nil, err
		}
	}
	var paths []string
	var steps []func(*cloudcodev1.Session)
	add := func(asked bool, path string, step func(*cloudcodev1.Session)) {
		if asked {
			paths, steps = append(paths, path), append(steps, step)
		}
	}
	add(given("label"), "labels", func(t *cloudcodev1.Session) { t.Labels = merge(t.Labels, labels, noLabels) })
	add(given("image"), "spec.image", func(t *cloudcodev1.Session) { t.Spec.Image = s.image })
	add(given("env") || given("env-file"), "spec.env", func(t *cloudcodev1.Session) { t.Spec.Env = merge(t.Spec.Env, env, noEnv) })
	add(given("opencode-config"), "spec.opencode_config", func(t *cloudcodev1.Session) { t.Spec.OpencodeConfig = config })
	add(given("node-selector"), "spec.node_selector", func(t *cloudcodev1.Session) {
		t.Spec.NodeSelector = merge(t.Spec.NodeSelector, selector, noSelector)
	})
	add(given("cpu"), "spec.resources.cpu_millis", func(t *cloudcodev1.Session) { t.Spec.Resources.CpuMillis = s.cpu.value })
	add(given("memory"), "spec.resources.memory_bytes", func(t *cloudcodev1.Session) { t.Spec.Resources.MemoryBytes = s.memory.value })
	add(given("disk"), "spec.resources.disk_bytes", func(t *cloudcodev1.Session) { t.Spec.Resources.DiskBytes = s.disk.value })
	add(given("pids"), "spec.resources.pids", func(t *cloudcodev1.Session) { t.Spec.Resources.Pids = s.pids })
	if len(paths) == 0 && !more {
		return nil, nil, usagef("nothing to change: name at least one of --label, --image, --env, --env-file, --opencode-config, --node-selector, --cpu, --memory, --disk, --pids, --s3-access-key-id, --s3-secret-access-key-file")
	}
	return func(t *cloudcodev1.Session) {
		if t.Spec == nil {
			t.Spec = &cloudcodev1.SessionSpec{}
		}
		if t.Spec.Resources == nil {
			t.Spec.Resources = &cloudcodev1.Resources{}
		}
		for _, step := range steps {
			step(t)
		}
	}, paths, nil
}

func merge(old, set map[string]string, removed []string) map[string]string {
	out := maps.Clone(old)
	if out == nil {
		out = map[string]string{}
	}
	for _, k := range removed {
		delete(out, k)
	}
	maps.Copy(out, set)
	return out
}

// updateSession reads, changes and writes; the etag refuses a write over what
// somebody else (or the session's own progress) changed meanwhile, and then it
// is tried again.
func (c *client) updateSession(cmd *cobra.Command, id string, change func(*cloudcodev1.Session), paths []string) (*cloudcodev1.Session, error) {
	const attempts = 5
	for attempt := 1; ; attempt++ {
		s, err := c.getSession(cmd.Context(), id)
		if err != nil {
			return nil, err
		}
		change(s)
		ctx, cancel := c.request(cmd.Context())
		out, err := c.sessions.UpdateSession(ctx, &cloudcodev1.UpdateSessionRequest{
			Session: s, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
		})
		cancel()
		if status.Code(err) != codes.Aborted || attempt == attempts {
			return out, err
		}
		if err := sleep(cmd.Context(), c.pace.minPause); err != nil {
			return nil, err
		}
	}
}
