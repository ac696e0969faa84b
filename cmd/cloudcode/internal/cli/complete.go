package cli

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"
)

// completionTimeout is short: somebody has pressed Tab.
const completionTimeout = 2 * time.Second

// completeSessions completes up to limit session ids; -1 is any number.
func completeSessions(limit int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if limit >= 0 && len(given) >= limit {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return completeFrom(cmd, func(ctx context.Context, c *client) ([]cobra.Completion, error) {
			all, err := c.listSessions(ctx, "")
			var out []cobra.Completion
			for _, s := range all {
				if id := idOf(s.GetName()); !slices.Contains(given, id) {
					out = append(out, cobra.CompletionWithDesc(id, s.GetState().String()))
				}
			}
			return out, err
		})
	}
}

func completeNodes(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeFrom(cmd, func(ctx context.Context, c *client) ([]cobra.Completion, error) {
		all, err := c.listNodes(ctx)
		var out []cobra.Completion
		for _, n := range all {
			out = append(out, cobra.CompletionWithDesc(idOf(n.GetName()), n.GetState().String()))
		}
		return out, err
	})
}

// completeFrom asks the server; errors complete nothing.
func completeFrom(cmd *cobra.Command, list func(context.Context, *client) ([]cobra.Completion, error)) ([]cobra.Completion, cobra.ShellCompDirective) {
	const none = cobra.ShellCompDirectiveNoFileComp
	if err := applyEnv(cmd); err != nil {
		return nil, none
	}
	c, err := dial(cmd)
	if err != nil {
		cobra.CompDebugln(err.Error(), false)
		return nil, none
	}
	defer c.close()
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	out, err := list(ctx, c)
	if err != nil {
		cobra.CompDebugln(err.Error(), false)
		return nil, none
	}
	return out, none
}
